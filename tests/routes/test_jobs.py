"""Submitting, finding and waiting for jobs."""

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.jobs import Actor, Status
from app.store import life, workers
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller, Service, assert_error, serve
from tests.waiting import until

pytestmark = pytest.mark.routes
MakeCaller = Callable[..., Caller]

FIELDS = {
    "id", "object", "name", "recipe", "recipe_version", "kind", "dataset", "status", "wanted", "status_reason", "queue",
    "progress", "metrics", "best", "model", "result", "files", "parent", "children", "retry_of", "attempt",
    "max_attempts", "exact", "worker", "error", "spec", "plan", "created_at", "started_at", "finished_at", "metadata",
    "priority",
}  # fmt: skip
UNKNOWN = "job_00000000000000000000000000"


@pytest.fixture(scope="module", autouse=True)
def catalogue(engine: Engine) -> None:
    factories.publish_catalogue(engine)


@pytest.fixture
def dataset(engine: Engine, caller: Caller) -> str:
    return make_dataset(engine, caller)


def make_dataset(engine: Engine, caller: Caller, **columns: Any) -> str:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        return factories.make_dataset(session, project, **columns).id


def make_job(engine: Engine, caller: Caller, status: Status = Status.QUEUED, **columns: Any) -> str:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        job = factories.make_job(session, project, **columns)
        return factories.bring(session, job, status).id


def body(dataset: str, **changes: Any) -> dict[str, Any]:
    return {"recipe": "image_classification", "dataset": dataset, "model": {"architecture": "small_cnn"}} | changes


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


def test_labels_are_required_where_there_are_none(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    facts = {
        "task": "unlabelled_images", "classes": [], "splits": {"train": 8}, "labelled": {"train": 0}, "features": {},
        "channels": 3,
    }  # fmt: skip
    unlabelled = make_dataset(engine, caller, task="unlabelled_images", facts=facts)
    error = assert_error(client.post("/v1/jobs", json=body(unlabelled)), 422)
    assert "no training sample of this dataset has one" in error["message"]
    one_class = make_dataset(
        engine, caller, facts=facts | {"task": "image_classification", "classes": ["cat"], "labelled": {"train": 8}}
    )
    error = assert_error(client.post("/v1/jobs", json=body(one_class)), 422)
    assert "at least 2 classes; this dataset has 1: cat" in error["message"]
    assert client.post("/v1/jobs", json=body(unlabelled, recipe="autoencoder")).status_code == 201


def test_a_dataset_must_be_there_and_ready(
    client: httpx.Client, caller: Caller, make_caller: MakeCaller, engine: Engine
) -> None:
    error = assert_error(client.post("/v1/jobs", json=body("ds_" + "0" * 26)), 404)
    assert error["param"] == "dataset"
    foreign = make_dataset(engine, make_caller())
    assert_error(client.post("/v1/jobs", json=body(foreign)), 404)
    processing = make_dataset(engine, caller, ready=False)
    error = assert_error(client.post("/v1/jobs", json=body(processing)), 409, "dataset_not_ready")
    assert error["status"] == "processing"
    failed = make_dataset(engine, caller, ready=False, status="failed")
    error = assert_error(client.post("/v1/jobs", json=body(failed)), 409, "dataset_failed")
    assert error["status"] == "failed"


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


def test_starting_from_a_model(client: httpx.Client, caller: Caller, dataset: str, engine: Engine) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        model = factories.make_model(session, project).id
        unready = factories.make_model(session, project, status="processing", config=None).id
    job = client.post("/v1/jobs", json=body(dataset, model=model)).json()
    assert (job["status"], job["spec"]["model"]) == ("queued", model)
    with transaction(engine) as session:
        assert session.get_one(tables.Job, job["id"]).base_model_id == model
    error = assert_error(client.post("/v1/jobs", json=body(dataset, model=unready)), 409, "model_not_ready")
    assert error["status"] == "processing"
    assert_error(client.post("/v1/jobs", json=body(dataset, model="mdl_" + "0" * 26)), 404)
    error = assert_error(client.post("/v1/jobs", json=body(dataset, model=model, params={"trainable": "last:6"})), 422)
    assert "last:1 to last:5" in error["message"]


def test_a_model_as_weights_means_the_same(client: httpx.Client, caller: Caller, dataset: str, engine: Engine) -> None:
    with transaction(engine) as session:
        model = factories.make_model(session, session.get_one(tables.Project, caller.project)).id
    same = {"architecture": "resnet18", "weights": model, "image_size": 32}
    job = client.post("/v1/jobs", json=body(dataset, model=same))
    assert job.status_code == 201, job.text
    assert job.json()["spec"]["model"] == model
    other = body(dataset, model={"architecture": "small_cnn", "weights": model})
    error = assert_error(client.post("/v1/jobs", json=other), 422)
    assert error["param"] == "model.architecture"


def test_a_public_model_may_be_started_from(
    client: httpx.Client, make_caller: MakeCaller, dataset: str, engine: Engine
) -> None:
    other = make_caller()
    with transaction(engine) as session:
        project = session.get_one(tables.Project, other.project)
        public = factories.make_model(session, project, visibility="public").id
        private = factories.make_model(session, project).id
    assert client.post("/v1/jobs", json=body(dataset, model=public)).status_code == 201
    assert_error(client.post("/v1/jobs", json=body(dataset, model=private)), 404)


@pytest.mark.parametrize("status", [Status.QUEUED, Status.RUNNING, Status.PAUSED])
def test_a_job_waits_for_the_model_of_another(
    client: httpx.Client, caller: Caller, dataset: str, engine: Engine, status: Status
) -> None:
    parent = make_job(engine, caller, status, spec={"model": {"architecture": "resnet18"}})
    child = client.post("/v1/jobs", json=body(dataset, model=parent)).json()
    assert child["status"] == "waiting"
    assert child["queue"] == {"position": None}
    refused = client.post("/v1/jobs", json=body(dataset, model=child["id"], params={"trainable": "last:7"}))
    assert "resnet18 has 5 stages" in assert_error(refused, 422)["message"]  # known through the whole chain
    grandchild = client.post("/v1/jobs", json=body(dataset, model=child["id"])).json()
    assert grandchild["status"] == "waiting"


def test_a_parent_that_has_ended_is_used_at_once_or_refused(
    client: httpx.Client, caller: Caller, dataset: str, engine: Engine
) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        parent = factories.make_job(session, project)
        model = factories.make_model(session, project, job_id=parent.id)
        parent.model_id = model.id
        factories.bring(session, parent, Status.SUCCEEDED)
    child = client.post("/v1/jobs", json=body(dataset, model=parent.id)).json()
    assert child["status"] == "queued"
    with transaction(engine) as session:
        assert session.get_one(tables.Job, child["id"]).base_model_id == model.id

    failed = make_job(engine, caller, Status.FAILED)
    error = assert_error(client.post("/v1/jobs", json=body(dataset, model=failed)), 409, "parent_failed")
    assert error["status"] == "failed"
    makes_none = make_job(engine, caller, kind="apply")
    assert_error(client.post("/v1/jobs", json=body(dataset, model=makes_none)), 422)
    assert_error(client.post("/v1/jobs", json=body(dataset, model=UNKNOWN)), 404)


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


def test_waiting_answers_at_the_next_change(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = make_job(engine, caller)

    def cancel_soon() -> None:
        time.sleep(0.4)
        with transaction(engine) as session:
            locked = life.lock(session, job)
            assert locked is not None
            life.move(session, locked, Status.CANCELLED, actor=Actor.API)

    thread = threading.Thread(target=cancel_soon)
    thread.start()
    started = time.monotonic()
    answer = client.get(f"/v1/jobs/{job}", params={"wait": 20})
    thread.join()
    assert answer.json()["status"] == "cancelled"
    assert 0.3 < time.monotonic() - started < 5
    started = time.monotonic()
    assert client.get(f"/v1/jobs/{job}", params={"wait": 20}).json()["status"] == "cancelled"
    assert time.monotonic() - started < 2  # it has ended: nothing more will change


def test_waiting_ends_when_the_time_is_up(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = make_job(engine, caller)
    started = time.monotonic()
    assert client.get(f"/v1/jobs/{job}", params={"wait": 0.5}).json()["status"] == "queued"
    assert 0.4 < time.monotonic() - started < 4
    assert_error(client.get(f"/v1/jobs/{job}", params={"wait": -1}), 422)


def test_many_who_wait_hold_neither_threads_nor_connections(
    service: Service, make_caller: MakeCaller, engine: Engine
) -> None:
    caller = make_caller()
    job = make_job(engine, caller)
    waiting = [
        threading.Thread(target=lambda: caller.http.get(f"/v1/jobs/{job}", params={"wait": 15})) for _ in range(20)
    ]  # fmt: skip
    for thread in waiting:
        thread.start()
    notifier = service.app.state.notifier
    until(lambda: notifier.open_streams >= 20, 10)
    with httpx.Client(base_url=service.url, headers=caller.http.headers, trust_env=False) as other:
        assert_error(other.get(f"/v1/jobs/{job}", params={"wait": 5}), 429, "too_many_streams")
        started = time.monotonic()
        assert other.post(f"/v1/jobs/{job}/cancel").status_code == 202
        assert time.monotonic() - started < 5
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
    assert notifier.open_streams == 0


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
