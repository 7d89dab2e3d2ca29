"""Generated requests against the OpenAPI document: no 5xx, and every answer is as the document says."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from sqlalchemy import Engine

from app.main import create_app
from app.settings import Settings
from app.store import tables
from app.store.blobs import Blobs
from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, Service
from tests.routes.shards import publish

pytestmark = pytest.mark.routes

EXAMPLES = int(
    os.environ.get("SCHEMA_EXAMPLES", "10")
)  # of each operation, well formed and not; more for a long search
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


def _without_tuples(schema: Any) -> Any:
    """Write `[step, value]` as a list of either: schemathesis 4.32 makes of `prefixItems` a schema that it refuses."""
    if isinstance(schema, dict):
        below = {name: _without_tuples(value) for name, value in schema.items()}
        if "prefixItems" in below:
            below["items"] = {"anyOf": below.pop("prefixItems")}
        return below
    return [_without_tuples(value) for value in schema] if isinstance(schema, list) else schema


DOCUMENT = _without_tuples(
    create_app(Settings(home=Path(tempfile.gettempdir()))).openapi()  # pyright: ignore[reportCallIssue]
)
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CALLS = [
    pytest.param(method.upper(), path, mode, id=f"{method.upper()} {path} {mode.value}")
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    for mode in (POSITIVE, NEGATIVE)
    if mode is POSITIVE or {"parameters", "requestBody", "security"} & set(operation)  # something that can be wrong
]

load_all_checks()
CHECKED = CHECKS.get_by_names(
    [
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
        "response_schema_conformance",
    ]
)  # fmt: skip


@pytest.fixture
def known(caller: Caller, engine: Engine, blobs: Blobs) -> dict[str, Any]:
    """Make one object of each kind, so that generated calls also get beyond `not found`."""
    factories.publish_catalogue(engine)
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        dataset = factories.make_dataset(session, project, ready=False)
        job = factories.make_job(session, project, dataset_id=dataset.id)
        model = factories.make_model(session, project)
    with transaction(engine) as session:
        publish(engine, blobs, session, dataset, {"train": [0, 1, None, 0, 1], "test": [1]})
    return {
        "dataset_id": dataset.id, "job_id": job.id, "model_id": model.id, "number": 1, "name": "image_classification",
    }  # fmt: skip


@pytest.mark.parametrize(("method", "path", "mode"), CALLS)
def test_generated_calls(
    make_caller: Callable[..., Caller], caller: Caller, service: Service, known: dict[str, Any], method: str, path: str,
    mode: GenerationMode,
) -> None:  # fmt: skip
    key = make_caller("read", "write", "admin", "operator", project=caller.project).key

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        phases=[Phase.explicit, Phase.generate], derandomize=True,
    )  # fmt: skip
    @given(case=SCHEMA[path][method].as_strategy(mode), real=st.booleans())
    def check(case: Case, real: bool) -> None:
        if real:
            case.path_parameters = {
                name: known.get(name, value) for name, value in (case.path_parameters or {}).items()
            }  # fmt: skip
        if "wait" in (case.query or {}):
            case.query["wait"] = 0  # nothing is wrong with waiting, but it takes its time
        headers = dict(case.headers or {}) | {"Authorization": f"Bearer {key}"}
        response = case.call(base_url=service.url, headers=headers, timeout=60)
        case.validate_response(response, checks=CHECKED)  # pyright: ignore[reportArgumentType]

    check()
