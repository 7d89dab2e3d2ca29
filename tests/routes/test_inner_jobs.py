"""Params of a recipe that another one's params name: refused at the POST, through the rows that a worker published."""

from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.inner_jobs import Part
from app.store import recipes
from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, assert_error
from tests.routes.test_jobs import make_dataset

pytestmark = pytest.mark.routes

OBJECT: dict[str, Any] = {"type": "object", "default": {}}
METHOD = {
    "type": "object",
    "required": ["recipe"],
    "properties": {
        "recipe": {"type": "string"},
        "params": OBJECT | Part(named_by="recipe", kinds=("pretrain",)).keyword(),
    },
}
ROW = {
    "kind": "apply",
    "version": "1",
    "summary": "Runs others.",
    "tasks": ["image_classification"],
    "defaults": {},
    "template": {},
    "requires": {"labels": False},
}


@pytest.fixture(scope="module", autouse=True)
def catalogue(engine: Engine) -> None:
    factories.publish_catalogue(engine)
    params = {
        "methods": {"type": "array", "items": METHOD},
        "finetune": OBJECT | Part(recipe="image_classification").keyword(),
    }
    schema = {"properties": {"params": {"type": "object", "additionalProperties": False, "properties": params}}}
    with transaction(engine) as session:
        recipes.publish(session, {"recipes": [ROW | {"name": "of_others", "schema": schema}], "architectures": []})


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
@pytest.mark.parametrize(
    ("params", "param", "says"),
    [
        ({"methods": [{"recipe": "autoencodr"}]}, "params.methods.0.recipe", "did you mean autoencoder?"),
        (
            {"methods": [{"recipe": "image_classification"}]},
            "params.methods.0.recipe",
            "of kind pretrain is wanted: autoencoder",
        ),
        (
            {"methods": [{"recipe": "autoencoder"}, {"recipe": "autoencoder", "params": {"noise": 2}}]},
            "params.methods.1.params.noise",
            "maximum of 1",
        ),
        (
            {"methods": [{"recipe": "autoencoder", "params": {"nois": 0}}]},
            "params.methods.0.params.nois",
            "did you mean noise?",
        ),
        ({"finetune": {"trainable": "heads"}}, "params.finetune.trainable", "does not match"),
        ({"finetune": {"trainable": "last:9"}}, "params.finetune.trainable", "last:1 to last:4"),
    ],
)
def test_a_wrong_inner_value_is_named_by_its_path(
    client: httpx.Client, caller: Caller, engine: Engine, params: dict[str, Any], param: str, says: str, query: str
) -> None:
    asked = {
        "recipe": "of_others",
        "dataset": make_dataset(engine, caller),
        "model": {"architecture": "small_cnn"},
        "params": params,
    }
    error = assert_error(client.post(f"/v1/jobs{query}", json=asked), 422, "invalid")
    assert error["param"] == param
    assert says in error["message"]
    assert client.get("/v1/jobs").json()["data"] == []


def test_inner_values_that_hold_are_accepted(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    params = {"methods": [{"recipe": "autoencoder", "params": {"noise": 0.5}}], "finetune": {"trainable": "last:2"}}
    asked = {
        "recipe": "of_others",
        "dataset": make_dataset(engine, caller),
        "model": {"architecture": "small_cnn"},
        "params": params,
    }
    answer = client.post("/v1/jobs", json=asked)
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["params"] == params
