"""Models: list, change, download, import, delete; and what the public may see."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, select

from app.domain.errors import Failure
from app.domain.jobs import Actor, Status
from app.domain.models import ModelConfig
from app.store import life, models
from app.store.blobs import Blobs
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller, assert_error

pytestmark = [pytest.mark.routes, pytest.mark.usefixtures("catalogue")]
MakeCaller = Callable[..., Caller]

FIELDS = {
    "id", "object", "name", "version", "status", "task", "architecture", "parameters", "classes", "metrics", "files",
    "lineage", "visibility", "tags", "description", "error", "created_at",
}  # fmt: skip
CONTENT = {
    "README.md": b"# A card\n", "config.json": b"{}", "metrics.json": b'{"a": 1}',
    "model.safetensors": bytes(range(256)) * 9000,
}  # fmt: skip
CONFIG = ModelConfig(
    architecture={"architecture": "resnet18"}, task="image_classification", classes=("cat", "dog"), image_size=32,
    mean=(0.5,) * 3, std=(0.25,) * 3,
)  # fmt: skip


def publish(engine: Engine, blobs: Blobs, caller: Caller, name: str = "cats") -> str:
    """Publish a model with files, as the end of a job does."""
    kept = [(file, factories.make_blob(engine, blobs, data)) for file, data in CONTENT.items()]
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        dataset = factories.make_dataset(session, project).id
        job = factories.make_job(session, project, name=name, dataset_id=dataset)
        factories.bring(session, job, Status.RUNNING)
        files = [(file, stored.bytes, stored.sha256) for file, stored in kept]
        model = models.publish(session, job, config=CONFIG, parameters=5, metrics={"a": 1.0}, files=files)
        job.model_id = model
        life.move(session, job, Status.SUCCEEDED, actor=Actor.WORKER)
        return model


def test_a_published_model(client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs) -> None:
    model = client.get(f"/v1/models/{publish(engine, blobs, caller)}").json()
    assert set(model) == FIELDS
    assert (model["object"], model["name"], model["version"], model["status"]) == ("model", "cats", 1, "ready")
    assert (model["task"], model["classes"], model["parameters"]) == ("image_classification", ["cat", "dog"], 5)
    assert model["architecture"] == {"architecture": "resnet18"}
    assert model["metrics"] == {"a": 1.0}
    job = client.get(f"/v1/jobs/{model['lineage']['job']}").json()
    assert job["model"] == model["id"]
    assert model["lineage"] == {
        "job": job["id"], "dataset": job["dataset"], "base_model": None, "recipe": "image_classification",
        "recipe_version": "1",
    }  # fmt: skip
    assert [file["name"] for file in model["files"]] == sorted(CONTENT)
    assert client.get(f"/v1/models/{model['id']}/files").json()["data"] == model["files"]


def test_names_have_versions_and_lists_are_filtered(
    client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs
) -> None:
    first, second, dogs = (publish(engine, blobs, caller, name) for name in ("cats", "cats", "dogs"))
    assert [client.get(f"/v1/models/{one}").json()["version"] for one in (first, second, dogs)] == [1, 2, 1]

    def ids(**params: Any) -> list[str]:
        return [model["id"] for model in client.get("/v1/models", params=params).json()["data"]]

    assert ids() == [dogs, second, first]
    assert ids(name="cats") == [second, first]
    assert ids(task="image_classification", limit=1) == [dogs]
    assert ids(task="other") == []
    assert ids(visibility="private", order="asc") == [first, second, dogs]
    page = client.get("/v1/models", params={"limit": 2}).json()
    assert ids(limit=2, after=page["last_id"]) == [first]
    client.delete(f"/v1/models/{second}")
    assert ids(name="cats") == [first]
    third = publish(engine, blobs, caller, "cats")
    assert client.get(f"/v1/models/{third}").json()["version"] == 3  # a deleted version is never another's


def test_a_model_is_changed(client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs) -> None:
    model = publish(engine, blobs, caller)
    publish(engine, blobs, caller, "dogs")
    before = client.get(f"/v1/models/{model}").json()
    changed = client.patch(
        f"/v1/models/{model}", json={"tags": ["a"], "description": "d", "visibility": "public"}
    ).json()
    assert changed == before | {"tags": ["a"], "description": "d", "visibility": "public"}
    renamed = client.patch(f"/v1/models/{model}", json={"name": "dogs"}).json()
    assert (renamed["name"], renamed["version"]) == ("dogs", 2)
    again = client.patch(f"/v1/models/{model}", json={"name": "dogs"}).json()
    assert again == renamed == client.get(f"/v1/models/{model}").json()
    for wrong in ({"nmae": "x"}, {"visibility": "secret"}, {"tags": ["x" * 65]}, {"name": ""}, {"tags": "a"}):
        assert_error(client.patch(f"/v1/models/{model}", json=wrong), 422)


def test_files_are_downloaded_whole_and_in_parts(
    client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs
) -> None:
    model = publish(engine, blobs, caller)
    for name, data in CONTENT.items():
        answer = client.get(f"/v1/models/{model}/files/{name}")
        assert answer.content == data
        assert answer.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
        assert answer.headers["repr-digest"].startswith("sha-256=:")
    weights = f"/v1/models/{model}/files/model.safetensors"
    part = client.get(weights, headers={"Range": "bytes=1000000-1500000"})
    assert (part.status_code, part.content) == (206, CONTENT["model.safetensors"][1_000_000:1_500_001])
    assert client.get(f"/v1/models/{model}/files/config.json").headers["content-type"] == "application/json"
    assert client.get(f"/v1/models/{model}/files/README.md").headers["content-type"].startswith("text/markdown")
    assert_error(client.get(f"/v1/models/{model}/files/../config.yaml"), 404)
    assert_error(client.get(f"/v1/models/{model}/files/weights.bin"), 404, "no_such_file")


def test_the_zip_holds_every_file(client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs) -> None:
    model = publish(engine, blobs, caller, "my cats")
    answer = client.get(f"/v1/models/{model}/download")
    assert answer.headers["content-type"] == "application/zip"
    assert "my%20cats-v1.zip" in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == CONTENT
    assert client.get(f"/v1/models/{model}/download").content == answer.content


def test_a_model_is_deleted_but_remembered(client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs) -> None:
    model = publish(engine, blobs, caller)
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        user = factories.make_job(session, project, base_model_id=model).id
    error = assert_error(client.delete(f"/v1/models/{model}"), 409, "in_use")
    assert error["job"] == user
    client.post(f"/v1/jobs/{user}/cancel")
    assert client.delete(f"/v1/models/{model}").json() == {"id": model, "object": "model", "deleted": True}
    for path in ("", "/files", "/files/config.json", "/download"):
        assert_error(client.get(f"/v1/models/{model}{path}"), 404)
    assert_error(client.delete(f"/v1/models/{model}"), 404)
    with transaction(engine, read_only=True) as session:
        row = session.get_one(tables.Model, model)
        assert (row.name, row.version, row.deleted_at is None) == ("cats", 1, False)
        assert session.scalars(select(tables.ModelFile).where(tables.ModelFile.model_id == model)).all() == []


def test_the_public_reads_but_does_not_learn_where_it_came_from(
    client: httpx.Client, make_caller: MakeCaller, engine: Engine, blobs: Blobs
) -> None:
    owner = make_caller()
    model = publish(engine, blobs, owner)
    for path in ("", "/files", "/files/config.json", "/download"):
        assert_error(client.get(f"/v1/models/{model}{path}"), 404)
    owner.http.patch(f"/v1/models/{model}", json={"visibility": "public"})
    seen = client.get(f"/v1/models/{model}").json()
    assert seen["lineage"] == {
        "job": None, "dataset": None, "base_model": None, "recipe": "image_classification", "recipe_version": "1",
    }  # fmt: skip
    assert owner.http.get(f"/v1/models/{model}").json()["lineage"]["job"]
    assert client.get(f"/v1/models/{model}/files/config.json").content == b"{}"
    assert client.get(f"/v1/models/{model}/download").status_code == 200
    assert model in [
        one["id"] for one in client.get("/v1/models", params={"visibility": "public", "limit": 1000}).json()["data"]
    ]
    assert client.get("/v1/models").json()["data"] == []
    assert_error(client.patch(f"/v1/models/{model}", json={"name": "mine"}), 404)
    assert_error(client.delete(f"/v1/models/{model}"), 404)


def upload(
    client: httpx.Client, data: bytes = b"weights", headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    given = {"name": "imported", "architecture": '{"architecture": "resnet18", "image_size": 64}'} | fields
    files = {"file": ("w.safetensors", data, "application/octet-stream")}
    kept = {key: value for key, value in given.items() if value is not None}
    return client.post("/v1/models", data=kept, files=files, headers=headers or {})


def test_an_import_is_checked_by_an_internal_job(
    client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs
) -> None:
    answer = upload(
        client, classes='["cat", "dog"]', tags='["x"]', description="d", channels="1", mean="[0.1]", std="[1]"
    )
    assert answer.status_code == 202, answer.text
    model = answer.json()
    assert answer.headers["location"] == f"/v1/models/{model['id']}"
    assert (model["status"], model["tags"], model["description"], model["files"]) == ("processing", ["x"], "d", [])
    job = client.get(f"/v1/jobs/{model['lineage']['job']}").json()
    assert (job["kind"], job["recipe"], job["status"]) == ("internal", "import_model", "queued")
    assert job["spec"] == {
        "name": "imported", "classes": ["cat", "dog"], "head": None, "channels": 1, "mean": [0.1], "std": [1.0],
        "interpolation": "bilinear",
        "model": {
            "architecture": "resnet18", "weights": None, "image_size": 64, "stem": "standard", "keep_stages": None,
        },
    }  # fmt: skip
    assert_error(client.delete(f"/v1/models/{model['id']}"), 409, "in_use")
    weights = factories.make_blob(engine, blobs)
    with transaction(engine) as session:
        row = session.get_one(tables.Model, model["id"])
        assert row.upload_id is not None
        stored = session.get_one(tables.Upload, row.upload_id)
        assert (stored.bytes, stored.filename) == (7, "w.safetensors")
        running = session.get_one(tables.Job, job["id"])
        factories.bring(session, running, Status.RUNNING)
        files = [("model.safetensors", weights.bytes, weights.sha256)]
        running.model_id = models.publish(session, running, config=CONFIG, parameters=5, metrics={}, files=files)
        life.move(session, running, Status.SUCCEEDED, actor=Actor.WORKER)
    done = client.get(f"/v1/models/{model['id']}", params={"wait": 5}).json()
    assert (done["status"], done["parameters"], done["tags"]) == ("ready", 5, ["x"])
    assert [file["sha256"] for file in done["files"]] == [weights.sha256]
    assert len(client.get("/v1/models").json()["data"]) == 1


def test_a_failed_import_says_why(client: httpx.Client, engine: Engine) -> None:
    model = upload(client).json()
    with transaction(engine) as session:
        job = session.get_one(tables.Job, model["lineage"]["job"])
        factories.bring(session, job, Status.RUNNING)
        failure = Failure(fault="user", code="weights_do_not_fit", message="conv1.weight is missing.")
        life.move(session, job, Status.FAILED, actor=Actor.WORKER, failure=failure)
    failed = client.get(f"/v1/models/{model['id']}", params={"wait": 5}).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "weights_do_not_fit")
    assert client.delete(f"/v1/models/{model['id']}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"name": None}, "name", "required"),
        ({"architecture": None}, "architecture", "required"),
        ({"architecture": "resnet81"}, "architecture.architecture", "did you mean resnet18"),
        ({"architecture": "{nonsense"}, "architecture", "Send JSON"),
        ({"architecture": '{"architecture": "resnet18", "width": 2}'}, "architecture.width", "Unknown field"),
        ({"architecture": '{"architecture": "resnet18", "weights": "X"}'}, "architecture.weights", "Leave this out"),
        ({"classes": "cat, dog"}, "classes", "a list of names"),
        ({"classes": '["\\u0000"]'}, "classes", "Send JSON"),
        ({"classes": '["\\ud800"]'}, "classes", "Send JSON"),
        ({"mean": "[0.5]"}, "mean", "3 numbers"),
        ({"mean": "[NaN, 0, 0]"}, "mean", "finite"),
        ({"std": "[0, 1, 1]"}, "std", "greater than 0"),
        ({"channels": "2"}, "channels", "1 or 3"),
        ({"head": '{"hiden": [3]}'}, "head", "no such field"),
        ({"unknown": "x"}, "unknown", "Unknown part"),
    ],
)
def test_a_wrong_field_of_an_import_is_named(
    client: httpx.Client, fields: dict[str, Any], param: str, says: str
) -> None:
    error = assert_error(upload(client, **fields), 422)
    assert error["param"].startswith(param), error
    assert says in error["message"], error
    assert client.get("/v1/models").json()["data"] == []


def test_an_import_by_name_alone(client: httpx.Client) -> None:
    model = upload(client, architecture="small_cnn").json()
    job = client.get(f"/v1/jobs/{model['lineage']['job']}").json()
    assert job["spec"]["model"]["width"] == 1.0


def test_the_same_import_twice_is_one(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "import"}
    first = upload(client, headers=headers)
    again = upload(client, headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert_error(upload(client, b"other", headers=headers), 422, "idempotency_mismatch")
    assert len(client.get("/v1/models").json()["data"]) == 1


def test_an_import_must_be_a_form_with_a_file(client: httpx.Client) -> None:
    assert_error(client.post("/v1/models", json={"name": "x"}), 415)
    assert_error(client.post("/v1/models", content=b"x"), 415)
    error = assert_error(client.post("/v1/models", data={"name": "x"}, files={"name2": ("", b"")}), 422)
    assert error["param"] == "name2"


def test_scopes(make_caller: MakeCaller, engine: Engine, blobs: Blobs) -> None:
    owner = make_caller()
    model = publish(engine, blobs, owner)
    reader, writer = make_caller("read", project=owner.project), make_caller("write", project=owner.project)
    assert reader.http.get(f"/v1/models/{model}").status_code == 200
    for refused in (
        reader.http.patch(f"/v1/models/{model}", json={}),
        reader.http.delete(f"/v1/models/{model}"),
        upload(reader.http),
        writer.http.get(f"/v1/models/{model}"),
        writer.http.get(f"/v1/models/{model}/download"),
    ):
        assert_error(refused, 403)
    assert json.loads(writer.http.patch(f"/v1/models/{model}", json={}).content)["id"] == model
