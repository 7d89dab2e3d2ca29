"""What can be run, and by whom."""

import httpx
import pytest
from sqlalchemy import Engine

from app.store import recipes, workers
from app.store.session import transaction
from tests.routes.conftest import assert_error

pytestmark = [pytest.mark.routes, pytest.mark.usefixtures("catalogue")]


def test_recipes_describe_themselves(client: httpx.Client) -> None:
    listed = client.get("/v1/recipes").json()
    assert listed["object"] == "list"
    by_name = {recipe["name"]: recipe for recipe in listed["data"]}
    recipe = by_name["image_classification"]
    assert set(recipe) == {
        "object", "name", "kind", "version", "summary", "tasks", "schema", "defaults", "template", "requires",
    }  # fmt: skip
    assert recipe["kind"] == "finetune"
    assert recipe["requires"]["labels"] is True
    assert recipe["schema"]["properties"]["params"]["properties"]["trainable"]["default"] == "all"
    assert client.get("/v1/recipes/image_classification").json() == recipe


def test_an_unknown_recipe_names_the_nearest(client: httpx.Client) -> None:
    error = assert_error(client.get("/v1/recipes/autoencodr"), 404)
    assert "did you mean autoencoder?" in error["message"]


def test_architectures_give_their_facts(client: httpx.Client) -> None:
    listed = {one["name"]: one for one in client.get("/v1/architectures").json()["data"]}
    resnet = listed["resnet18"]
    assert {"object", "name", "family", "stages", "patch", "min_image_size", "channels", "parameters", "schema"} <= set(
        resnet
    )
    assert (resnet["object"], resnet["family"], resnet["min_image_size"]) == ("architecture", "convolutional", 32)


def test_publishing_again_replaces_and_keeps_what_others_published(engine: Engine, client: httpx.Client) -> None:
    row = {
        "name": "published_twice", "kind": "pretrain", "version": "1", "summary": "One.", "tasks": [], "schema": {},
        "defaults": {}, "template": {}, "requires": {}, "unknown_to_this_version": 1,
    }  # fmt: skip
    for summary in ("One.", "Two."):
        with transaction(engine) as session:
            recipes.publish(session, {"recipes": [row | {"summary": summary}], "architectures": []})
    assert client.get("/v1/recipes/published_twice").json()["summary"] == "Two."
    assert client.get("/v1/recipes/autoencoder").status_code == 200


def test_workers_are_listed_with_the_age_of_their_heartbeat(client: httpx.Client, engine: Engine) -> None:
    with transaction(engine) as session:
        workers.beat(
            session, "wrk_routes", host="here", slots=2, busy=1, gpus=[{"name": "H200", "memory_bytes": 1}],
            versions={"torch": "2"}, draining=True,
        )  # fmt: skip
    listed = {one["id"]: one for one in client.get("/v1/workers").json()["data"]}
    worker = listed["wrk_routes"]
    assert set(worker) == {
        "id", "object", "host", "slots", "busy", "gpus", "versions", "draining", "alive", "heartbeat_age_seconds",
        "started_at",
    }  # fmt: skip
    assert (worker["host"], worker["slots"], worker["busy"], worker["draining"]) == ("here", 2, 1, True)
    assert worker["alive"] is True
    assert 0 <= worker["heartbeat_age_seconds"] < 60


@pytest.mark.parametrize("path", ["/v1/recipes", "/v1/recipes/autoencoder", "/v1/architectures", "/v1/workers"])
def test_a_key_is_needed(anonymous: httpx.Client, path: str) -> None:
    assert_error(anonymous.get(path), 401)
