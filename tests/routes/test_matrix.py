"""Every route against every kind of caller, generated from the OpenAPI document: a new route is in here by itself.

A route that declares no scope, or a path parameter that nobody taught this test, fails it.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.main import create_app
from app.settings import Settings
from app.store import tables
from app.store.clock import Now
from app.store.ids import new_id
from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, assert_error

pytestmark = pytest.mark.routes
MakeCaller = Callable[..., Caller]

OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")}  # /metrics: in local mode only, see test_health
ANY_KEY = {("GET", "/v1/me"), ("POST", "/v1/session"), ("DELETE", "/v1/session")}
SCOPES = ("read", "write", "admin", "operator")
# Whose objects a path parameter names. Projects are the operator's, recipes everybody's, the others hang on a parent.
OWNED = {"dataset_id": "ds", "job_id": "job", "model_id": "mdl", "key_id": "key"}
FREE = {"project_id": "prj_x", "name": "x", "number": "0", "checkpoint_id": "ckpt_x"}


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    scope: str | None
    has_security: bool

    @property
    def parameters(self) -> list[str]:
        return re.findall(r"{(\w+)}", self.path)

    def url(self, **ids: str) -> str:
        values = FREE | {name: f"{prefix}_{'0' * 26}" for name, prefix in OWNED.items()} | ids
        return self.path.format(**values)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def operations() -> list[Operation]:
    """Read them from the document that the application publishes."""
    settings = Settings(home=Path(tempfile.gettempdir()))  # pyright: ignore[reportCallIssue]
    found: list[Operation] = []
    for path, methods in create_app(settings).openapi()["paths"].items():
        for method, operation in methods.items():
            scopes = {tuple(way.get("key", ())) for way in operation.get("security", ()) if "key" in way}
            (scope,) = scopes or {()}
            assert len(scope) <= 1
            found.append(Operation(method.upper(), path, scope[0] if scope else None, bool(scopes)))
    return found


OPERATIONS = operations()
GUARDED = [operation for operation in OPERATIONS if (operation.method, operation.path) not in OPEN]
SCOPED = [operation for operation in GUARDED if (operation.method, operation.path) not in ANY_KEY]
WITH_OWNED = [operation for operation in OPERATIONS if set(operation.parameters) & set(OWNED)]
LISTS = [operation for operation in OPERATIONS if operation.method == "GET" and not operation.parameters]


def call(http: httpx.Client, operation: Operation, **ids: str) -> httpx.Response:
    body = None if operation.method in ("GET", "DELETE") else {}
    return http.request(operation.method, operation.url(**ids), json=body)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_route_says_who_may_call_it(operation: Operation) -> None:
    assert set(operation.parameters) <= set(OWNED) | set(FREE), "teach this test whose object that parameter names"
    known = operation.scope in SCOPES
    assert known or (operation.method, operation.path) in OPEN | ANY_KEY, (
        "declare ReadDep, WriteDep, AdminDep or OperatorDep"
    )
    assert operation.has_security or (operation.method, operation.path) in OPEN


@pytest.mark.parametrize("operation", GUARDED, ids=str)
def test_without_a_valid_key(anonymous: httpx.Client, make_caller: MakeCaller, operation: Operation) -> None:
    assert_error(call(anonymous, operation), 401, "unauthenticated")
    revoked, expired = make_caller(*SCOPES, revoked_at=Now()), make_caller(*SCOPES, expires_at=Now() - 1)
    for ended in (revoked, expired):
        assert_error(call(ended.http, operation), 401, "unauthenticated")


@pytest.mark.parametrize("operation", SCOPED, ids=str)
def test_without_the_scope(make_caller: MakeCaller, operation: Operation) -> None:
    caller = make_caller(*(scope for scope in SCOPES if scope != operation.scope))
    error = assert_error(call(caller.http, operation), 403, "forbidden")
    assert error["required_scope"] == operation.scope


@pytest.fixture
def theirs(make_caller: MakeCaller, engine: Engine) -> dict[str, str]:
    """Make one object of each kind in another project."""
    other = make_caller()
    with transaction(engine) as session:
        project = session.get_one(tables.Project, other.project)
        dataset = factories.make_dataset(session, project)
        job = factories.make_job(session, project, dataset_id=dataset.id)
        model = factories.make_model(session, project)
        key, _ = factories.make_key(session, project)
    return {"dataset_id": dataset.id, "job_id": job.id, "model_id": model.id, "key_id": key.id}


@pytest.mark.parametrize("operation", WITH_OWNED, ids=str)
def test_another_projects_object_does_not_exist(
    make_caller: MakeCaller, theirs: dict[str, str], operation: Operation
) -> None:
    mine = make_caller(*SCOPES)
    foreign = call(mine.http, operation, **theirs)
    assert_error(foreign, 404, "not_found")
    unknown_ids: dict[str, Any] = {name: new_id(prefix) for name, prefix in OWNED.items()}  # pyright: ignore
    unknown = call(mine.http, operation, **unknown_ids)
    assert _without_request_id(foreign) == _without_request_id(unknown)


def _without_request_id(response: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    request_id = response.headers["x-request-id"]
    headers = {name: value for name, value in response.headers.items() if name not in ("x-request-id", "date")}
    return response.status_code, response.content.replace(request_id.encode(), b""), headers


@pytest.mark.parametrize("operation", LISTS, ids=str)
def test_lists_show_nothing_of_other_projects(
    make_caller: MakeCaller, theirs: dict[str, str], operation: Operation
) -> None:
    mine = make_caller(*SCOPES)
    answer = mine.http.get(operation.url(), params={"limit": 1000} if operation.path.startswith("/v1/") else None)
    for foreign in theirs.values():
        assert foreign not in answer.text
