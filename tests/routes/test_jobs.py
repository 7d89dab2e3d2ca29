"""Submitting and finding jobs."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.jobs import Status
from app.store import workers
from app.store.session import transaction
from tests.routes.conftest import Caller, Service, assert_error, serve
from tests.routes.submitting import body, make_dataset, make_job

pytestmark = [pytest.mark.routes, pytest.mark.usefixtures("catalogue")]
MakeCaller = Callable[..., Caller]

FIELDS = {
    "id", "object", "name", "recipe", "recipe_version", "kind", "dataset", "status", "wanted", "status_reason", "queue",
    "progress", "metrics", "best", "model", "result", "files", "parent", "children", "retry_of", "attempt",
    "max_attempts", "exact", "worker", "error", "spec", "plan", "created_at", "started_at", "finished_at", "metadata",
    "priority",
}  # fmt: skip


@pytest.fixture
def dataset(engine: Engine, caller: Caller) -> str:
    return make_dataset(engine, caller)


def test_a_job_is_queued_with_its_whole_spec(client: httpx.Client, dataset: str) -> None:
    answer = client.post(
        "/v1/jobs", json=body(dataset, name="cats", metadata={"team": "a"}, priority=3, training={"epochs": 2})
    )
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert set(job) == FIELDS
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["status"], job["wanted"], job["kind"]) == ("job", "queued", "run", "finetune")
    assert (job["name"], job["dataset"], job["metadata"], job["priority"]) == ("cats", dataset, {"team": "a"}, 3)
    assert job["spec"]["training"]["epochs"] == 2
    assert job["spec"]["training"]["optimizer"]["betas"] == [0.9, 0.999]
    assert job["spec"]["params"] == {"trainable": "all"}
    assert job["spec"]["model"]["width"] == 1.0
    assert job["plan"] is None
    assert job["progress"] == {
        "fraction": 0.0, "phase": None, "step": None, "steps": None, "epoch": None, "epochs": None,
        "samples_per_second": None, "eta_seconds": None, "updated_at": None,
    }  # fmt: skip
    assert job["children"] == {"total": 0, "by_status": {}}
    assert job["queue"]["position"] >= 1
    assert job["created_at"].endswith("Z")
    assert client.get(f"/v1/jobs/{job['id']}").json() == job


def test_a_job_without_a_name_gets_one(client: httpx.Client, dataset: str) -> None:
    job = client.post("/v1/jobs", json=body(dataset)).json()
    assert job["name"].startswith("image_classification-dataset ")
    assert job["spec"]["name"] == job["name"]


def test_the_position_counts_who_goes_first(client: httpx.Client, dataset: str) -> None:
    first, second = (client.post("/v1/jobs", json=body(dataset, priority=100)).json() for _ in range(2))
    assert second["queue"]["position"] - first["queue"]["position"] == 1
    urgent_before = client.get(f"/v1/jobs/{first['id']}").json()["queue"]["position"]
    client.post(f"/v1/jobs/{first['id']}/cancel")
    assert client.get(f"/v1/jobs/{second['id']}").json()["queue"]["position"] == urgent_before
    assert client.get(f"/v1/jobs/{first['id']}").json()["queue"] == {"position": None}


def test_a_job_that_no_worker_fits_says_so(client: httpx.Client, engine: Engine, dataset: str) -> None:
    asked = body(dataset, resources={"device": "cuda", "gpus": 7})
    job = client.post("/v1/jobs", json=asked).json()
    assert job["status_reason"] == "no_worker_fits"
    dry = client.post("/v1/jobs", params={"dry_run": "true"}, json=asked).json()
    assert "7 GPU(s)" in dry["warnings"][0]
    with transaction(engine) as session:
        workers.beat(session, "seven", host="h", slots=1, busy=0, gpus=[{"name": "g"}] * 7, versions={}, draining=False)
    try:
        assert client.get(f"/v1/jobs/{job['id']}").json()["status_reason"] is None
    finally:
        with transaction(engine) as session:
            workers.leave(session, "seven")


def test_a_dry_run_keeps_nothing(client: httpx.Client, dataset: str) -> None:
    answer = client.post("/v1/jobs", params={"dry_run": "true"}, json=body(dataset, training={"batch_size": 64}))
    assert answer.status_code == 200
    assert set(answer.json()) == {"spec", "plan", "warnings"}
    assert answer.json()["spec"]["recipe"] == "image_classification"
    assert answer.json()["plan"] is None
    assert "only 8 training samples" in answer.json()["warnings"][0]
    assert client.get("/v1/jobs").json()["data"] == []
    refused = client.post("/v1/jobs", params={"dry_run": "true"}, json=body(dataset, training={"epochs": 0}))
    assert_error(refused, 422)


def test_the_log_begins_with_the_warnings_of_a_dry_run(client: httpx.Client, dataset: str) -> None:
    asked = body(dataset, training={"batch_size": 64})
    said = client.post("/v1/jobs", params={"dry_run": "true"}, json=asked).json()["warnings"][0]
    job = client.post("/v1/jobs", json=asked).json()
    began, warned = client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
    assert (began["type"], warned["code"], warned["level"]) == ("status", "spec.doubtful", "warning")
    assert warned["message"] == said


def test_a_measured_dry_run_is_an_internal_job(client: httpx.Client, dataset: str) -> None:
    answer = client.post(
        "/v1/jobs", params={"dry_run": "measure"}, json=body(dataset), headers={"Idempotency-Key": "measure"}
    )
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["kind"], job["recipe"], job["spec"]["recipe"]) == ("internal", "measure", "image_classification")
    assert client.get("/v1/jobs").json()["data"] == []
    assert [one["id"] for one in client.get("/v1/jobs", params={"kind": "internal"}).json()["data"]] == [job["id"]]
    again = client.post(
        "/v1/jobs", params={"dry_run": "measure"}, json=body(dataset), headers={"Idempotency-Key": "measure"}
    )
    assert (again.status_code, again.json()) == (202, job)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"recipe": "image_clasification"}, "recipe", "did you mean image_classification?"),
        ({"recipe": None}, "recipe", "Name the recipe"),
        ({"recipe": 5}, "recipe", "name"),
        ({"params": {"trainble": "all"}}, "params.trainble", "did you mean trainable?"),
        ({"params": {"trainable": "last:9"}}, "params.trainable", "last:1 to last:4"),
        ({"model": {"architecture": "resnet81"}}, "model.architecture", "did you mean resnet18"),
        ({"model": {"architecture": "resnet18", "image_size": 8}}, "model.image_size", "at least 32 pixels"),
        ({"model": {"architecture": "small_cnn", "keep_stages": 9}}, "model.keep_stages", "has 4 stages"),
        ({"trainning": {}}, "trainning", "did you mean training?"),
        ({"training": {"epochs": "ten"}}, "training.epochs", "integer"),
        ({"training": {"epochs": 0}}, "training.epochs", "minimum of 1"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", ""),
        ({"dataset": "nonsense"}, "dataset", "match"),
    ],
)
def test_a_wrong_value_is_named(
    client: httpx.Client, dataset: str, change: dict[str, Any], param: str, says: str
) -> None:
    error = assert_error(client.post("/v1/jobs", json=body(dataset) | change), 422, "invalid")
    assert error["param"].startswith(param)
    assert says in error["message"]
    assert error["details"][0]["pointer"].replace("/", ".").lstrip(".") == error["param"]
    assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"null"])
def test_a_body_that_is_no_object(client: httpx.Client, raw: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert_error(client.post("/v1/jobs", content=raw, headers=headers), 422)
    assert_error(client.post("/v1/jobs", content=b"{", headers=headers), 400, "malformed")


def test_the_same_key_gives_the_same_job(client: httpx.Client, dataset: str) -> None:
    headers = {"Idempotency-Key": "once"}
    first = client.post("/v1/jobs", json=body(dataset), headers=headers)
    again = client.post("/v1/jobs", json=body(dataset), headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["location"] == first.headers["location"]
    assert_error(
        client.post("/v1/jobs", json=body(dataset, priority=1), headers=headers), 422, "idempotency_mismatch"
    )  # fmt: skip
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_a_refused_call_leaves_its_key_free(client: httpx.Client, dataset: str) -> None:
    headers = {"Idempotency-Key": "retry me"[:5]}
    assert_error(client.post("/v1/jobs", json=body(dataset, params={"x": 1}), headers=headers), 422)
    assert client.post("/v1/jobs", json=body(dataset), headers=headers).status_code == 201


def test_a_project_may_queue_only_so_many(service: Service, make_caller: MakeCaller, engine: Engine) -> None:
    caller = make_caller()
    dataset = make_dataset(engine, caller)
    few = service.settings.model_copy(update={"max_queued_jobs": 2})
    service.app.state.settings = few
    try:
        for _ in range(2):
            assert caller.http.post("/v1/jobs", json=body(dataset)).status_code == 201
        refused = caller.http.post("/v1/jobs", json=body(dataset))
        assert_error(refused, 429, "too_many_jobs")
        assert int(refused.headers["retry-after"]) > 0
    finally:
        service.app.state.settings = service.settings
    jobs = caller.http.get("/v1/jobs").json()["data"]
    assert len(jobs) == 2


def test_lists_are_filtered_and_paged(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    running = make_job(engine, caller, Status.RUNNING, meta={"team": "a", "year": "2026"})
    failed = make_job(engine, caller, Status.FAILED, recipe="autoencoder", kind="pretrain", meta={"team": "b"})
    child = make_job(engine, caller, parent_id=running, child_key="1")
    internal = make_job(engine, caller, internal=True, kind="internal", recipe="ingest")

    def ids(**params: Any) -> list[str]:
        answer = client.get("/v1/jobs", params=params)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    assert ids() == [child, failed, running]
    assert ids(order="asc") == [running, failed, child]
    assert ids(status="failed") == [failed]
    assert ids(status=["failed", "running"]) == [failed, running]
    assert ids(recipe="autoencoder") == [failed]
    assert ids(parent=running) == [child]
    assert ids(kind="pretrain") == [failed]
    assert ids(kind="internal") == [internal]
    assert ids(**{"metadata[team]": "a"}) == [running]
    assert ids(**{"metadata[team]": "a", "metadata[year]": "2025"}) == []

    page = client.get("/v1/jobs", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (child, failed)
    assert ids(limit=2, after=page["last_id"]) == [running]
    assert client.get("/v1/jobs", params={"parent": running}).json()["data"][0]["parent"] == running
    parent = client.get(f"/v1/jobs/{running}").json()
    assert parent["children"] == {"total": 1, "by_status": {"queued": 1}}
    assert_error(client.get("/v1/jobs", params={"status": "dead"}), 422)
    assert_error(client.get("/v1/jobs", params={"limit": 0}), 422)


def test_a_failed_job_says_why(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = client.get(f"/v1/jobs/{make_job(engine, caller, Status.FAILED)}").json()
    assert job["error"] == {
        "class": "user", "code": "test", "message": "It failed.", "hint": None, "phase": None, "retryable": False,
    }  # fmt: skip
    assert job["finished_at"].endswith("Z")
    assert job["worker"] is None


def test_recipes_must_have_been_published(tmp_path: Any, service: Service) -> None:
    from app.main import create_app
    from app.store import migrate

    empty = service.settings.model_copy(
        update={"home": tmp_path, "database_url": f"sqlite:///{tmp_path / 'empty.db'}", "log_level": "error"}
    )
    migrate.upgrade(empty.database)
    with serve(create_app(empty), empty) as running:
        key = (tmp_path / "key").read_text().strip()
        with httpx.Client(
            base_url=running.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False
        ) as client:  # fmt: skip
            refused = client.post("/v1/jobs", json={"recipe": "simclr"})
            assert_error(refused, 503, "recipes_unavailable")
            assert int(refused.headers["retry-after"]) > 0
            for path in ("/v1/recipes", "/v1/recipes/simclr", "/v1/architectures"):
                assert_error(client.get(path), 503, "recipes_unavailable")
