"""Cancel, stop, pause, resume, retry, delete: every verb in every state."""

from collections.abc import Callable

import httpx
import pytest
from sqlalchemy import Engine, select

from app.domain.jobs import HELD, TERMINAL, Actor, Status, Verb, Wanted
from app.store import checkpoints, life
from app.store.blobs import Blobs
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller, assert_error
from tests.routes.submitting import make_job

pytestmark = [pytest.mark.routes, pytest.mark.usefixtures("catalogue")]
MakeCaller = Callable[..., Caller]
VERBS: tuple[Verb, ...] = ("cancel", "stop", "pause", "resume")


def make_waiting(engine: Engine, caller: Caller) -> str:
    parent = make_job(engine, caller)
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        return factories.make_job(session, project, status="waiting", wait_for_job_id=parent).id


def make_checkpoint(engine: Engine, blobs: Blobs, job_id: str, step: int = 1) -> str:
    stored = factories.make_blob(engine, blobs)
    with transaction(engine) as session:
        job = session.get_one(tables.Job, job_id)
        return checkpoints.insert(
            session, job, step=step, epoch=0, metrics={}, best_step=None, bytes=stored.bytes, sha256=stored.sha256
        ).id


def end_of(verb: Verb, status: Status) -> tuple[Status, Wanted] | None:
    """Say what a verb leads to in a job without a checkpoint; None is a refusal."""
    wanted = {"cancel": Wanted.CANCEL, "stop": Wanted.STOP, "pause": Wanted.PAUSE, "resume": Wanted.RUN}[verb]
    if status in TERMINAL:
        # `bring` cancelled it by the user's wish, and asking for the same again is harmless.
        return (status, wanted) if (verb, status) == ("cancel", Status.CANCELLED) else None
    if status in HELD:
        return status, wanted
    if verb in ("cancel", "stop"):
        return Status.CANCELLED, wanted
    if status is Status.WAITING:
        return None
    return (Status.PAUSED if verb == "pause" else Status.QUEUED), wanted


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("status", list(Status))
def test_every_verb_in_every_state(
    client: httpx.Client, caller: Caller, engine: Engine, verb: Verb, status: Status
) -> None:
    job = make_waiting(engine, caller) if status is Status.WAITING else make_job(engine, caller, status)
    expected = end_of(verb, status)
    answer = client.post(f"/v1/jobs/{job}/{verb}")
    if expected is None:
        error = assert_error(answer, 409, f"cannot_{verb}")
        assert error["status"] == status
        assert client.get(f"/v1/jobs/{job}").json()["status"] == status
        return
    assert answer.status_code == 202, answer.text
    assert (answer.json()["status"], answer.json()["wanted"]) == expected
    events = client.get(f"/v1/jobs/{job}/events").json()["data"]
    again = client.post(f"/v1/jobs/{job}/{verb}")
    assert (again.status_code, again.json()["status"]) == (202, expected[0])
    assert client.get(f"/v1/jobs/{job}/events").json()["data"] == events  # asking twice changes nothing


def test_a_wish_for_a_running_job_is_in_its_log(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = make_job(engine, caller, Status.RUNNING)
    client.post(f"/v1/jobs/{job}/stop")
    last = client.get(f"/v1/jobs/{job}/events").json()["data"][-1]
    assert (last["type"], last["code"]) == ("log", "wanted.stop")


def test_a_cancel_is_never_taken_back(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = make_job(engine, caller, Status.RUNNING)
    client.post(f"/v1/jobs/{job}/cancel")
    for verb in ("stop", "pause", "resume"):
        assert_error(client.post(f"/v1/jobs/{job}/{verb}"), 409, f"cannot_{verb}")
    assert client.get(f"/v1/jobs/{job}").json()["wanted"] == "cancel"


@pytest.mark.parametrize("status", [Status.QUEUED, Status.PAUSED])
def test_stopping_with_a_checkpoint_keeps_its_model(
    client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs, status: Status
) -> None:
    job = make_job(engine, caller, status)
    make_checkpoint(engine, blobs, job)
    answer = client.post(f"/v1/jobs/{job}/stop").json()
    assert (answer["status"], answer["wanted"]) == ("queued", "stop")


def test_cancelling_a_parent_fails_who_waits_for_its_model(
    client: httpx.Client, caller: Caller, engine: Engine
) -> None:
    parent = make_job(engine, caller)
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        waiting = factories.make_job(session, project, status="waiting", wait_for_job_id=parent).id
    client.post(f"/v1/jobs/{parent}/cancel")
    job = client.get(f"/v1/jobs/{waiting}").json()
    assert (job["status"], job["status_reason"], job["error"]["code"]) == ("failed", "parent_failed", "parent_failed")


def test_verbs_reach_the_children_in_the_same_transaction(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    parent = make_job(engine, caller, Status.RUNNING)
    queued = make_job(engine, caller, parent_id=parent, child_key="1")
    running = make_job(engine, caller, Status.RUNNING, parent_id=parent, child_key="2")
    done = make_job(engine, caller, Status.FAILED, parent_id=parent, child_key="3")
    with transaction(engine) as session:
        life.move(session, session.get_one(tables.Job, parent), Status.WAITING, actor=Actor.WORKER)

    def states() -> dict[str, tuple[str, str]]:
        with transaction(engine, read_only=True) as session:
            rows = session.execute(
                select(tables.Job.id, tables.Job.status, tables.Job.wanted).where(
                    tables.Job.id.in_([parent, queued, running, done])
                )
            )
            return {row.id: (row.status, row.wanted) for row in rows}

    assert client.post(f"/v1/jobs/{parent}/pause").json()["wanted"] == "pause"
    assert states() == {
        parent: ("waiting", "pause"), queued: ("paused", "pause"), running: ("running", "pause"),
        done: ("failed", "run"),
    }  # fmt: skip
    with transaction(engine) as session:
        session.get_one(tables.Job, running).progress = {"fraction": 0.5, "phase": "train"}
    shown = client.get(f"/v1/jobs/{parent}").json()
    assert shown["children"] == {"total": 3, "by_status": {"failed": 1, "paused": 1, "running": 1}}
    assert (shown["progress"]["fraction"], shown["progress"]["phase"]) == (0.5, "children"), "one ended, one half-way"
    assert {job["id"] for job in client.get("/v1/jobs", params={"parent": parent}).json()["data"]} == {
        queued, running, done,
    }  # fmt: skip
    client.post(f"/v1/jobs/{parent}/resume")
    assert states()[queued] == ("queued", "run")
    client.post(f"/v1/jobs/{parent}/cancel")
    assert states() == {
        parent: ("cancelled", "cancel"), queued: ("cancelled", "cancel"), running: ("running", "cancel"),
        done: ("failed", "run"),
    }  # fmt: skip


def test_a_stopped_parent_goes_on_with_what_its_children_have(
    client: httpx.Client, caller: Caller, engine: Engine
) -> None:
    parent = make_job(engine, caller, Status.RUNNING)
    queued = make_job(engine, caller, parent_id=parent, child_key="1")
    running = make_job(engine, caller, Status.RUNNING, parent_id=parent, child_key="2")
    with transaction(engine) as session:
        life.move(session, session.get_one(tables.Job, parent), Status.WAITING, actor=Actor.WORKER)
    for _ in range(2):
        answer = client.post(f"/v1/jobs/{parent}/stop").json()
        assert (answer["status"], answer["wanted"]) == ("waiting", "stop")
    assert client.get(f"/v1/jobs/{queued}").json()["status"] == "cancelled"
    assert client.get(f"/v1/jobs/{running}").json()["wanted"] == "stop"
    assert_error(client.post(f"/v1/jobs/{parent}/resume"), 409, "cannot_resume")
    with transaction(engine) as session:
        life.move(session, session.get_one(tables.Job, running), Status.STOPPED, actor=Actor.WORKER)
    answer = client.get(f"/v1/jobs/{parent}").json()
    assert (answer["status"], answer["wanted"]) == ("queued", "stop"), "a worker gathers what is there"


def test_an_internal_job_can_only_be_cancelled(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        job = factories.make_job(session, project, internal=True, kind="internal", recipe="ingest").id
        dataset = factories.make_dataset(session, project, ready=False, job_id=job).id
    for verb in ("stop", "pause", "resume"):
        assert_error(client.post(f"/v1/jobs/{job}/{verb}"), 409, f"cannot_{verb}")
    assert client.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
    assert_error(client.post(f"/v1/jobs/{job}/retry"), 409, "cannot_retry")
    assert client.get(f"/v1/datasets/{dataset}").json()["status"] == "failed"


def retryable(engine: Engine, caller: Caller, client: httpx.Client, status: Status) -> str:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        dataset = factories.make_dataset(session, project).id
    asked = {
        "recipe": "image_classification", "dataset": dataset, "model": {"architecture": "small_cnn"},
        "metadata": {"k": "v"}, "name": "first",
    }  # fmt: skip
    job = client.post("/v1/jobs", json=asked).json()["id"]
    with transaction(engine) as session:
        factories.bring(session, session.get_one(tables.Job, job), status)
    return job


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_a_retry_is_a_new_job_like_the_old_one(
    client: httpx.Client, caller: Caller, engine: Engine, status: Status
) -> None:
    old = client.get(f"/v1/jobs/{retryable(engine, caller, client, status)}").json()
    headers = {"Idempotency-Key": "again"}
    answer = client.post(f"/v1/jobs/{old['id']}/retry", headers=headers)
    assert answer.status_code == 201, answer.text
    new = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{new['id']}"
    assert (new["retry_of"], new["status"], new["attempt"]) == (old["id"], "queued", 0)
    assert (new["spec"], new["metadata"], new["dataset"]) == (old["spec"], old["metadata"], old["dataset"])
    assert client.get(f"/v1/jobs/{old['id']}").json()["status"] == status
    assert client.post(f"/v1/jobs/{old['id']}/retry", headers=headers).json() == new
    assert client.post(f"/v1/jobs/{old['id']}/retry", json={}).json()["id"] != new["id"]


def test_a_retry_goes_on_from_the_newest_checkpoint(
    client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs
) -> None:
    job = retryable(engine, caller, client, Status.FAILED)
    none = client.post(f"/v1/jobs/{job}/retry", json={"from_checkpoint": True})
    assert_error(none, 409, "no_checkpoint")
    make_checkpoint(engine, blobs, job, step=1)
    newest = make_checkpoint(engine, blobs, job, step=2)
    with transaction(engine) as session:
        row = session.get_one(tables.Job, job)
        row.plan, row.exact = {"batch_size": 7}, False
    new = client.post(f"/v1/jobs/{job}/retry", json={"from_checkpoint": True}).json()
    assert (new["plan"], new["exact"]) == ({"batch_size": 7}, False)
    assert client.post(f"/v1/jobs/{job}/retry").json()["exact"] is True, "from the start all bits are new"
    with transaction(engine) as session:
        assert session.get_one(tables.Job, new["id"]).resume_from == newest
    error = assert_error(client.delete(f"/v1/jobs/{job}"), 409, "in_use")
    assert error["job"] == new["id"]
    client.post(f"/v1/jobs/{new['id']}/cancel")
    assert client.delete(f"/v1/jobs/{job}").status_code == 200


def test_a_retry_outlives_the_job_it_started_from(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        dataset = factories.make_dataset(session, project).id
        parent = factories.make_job(session, project, spec={"model": {"architecture": "resnet18"}})
        model = factories.make_model(session, project, job_id=parent.id).id
        parent.model_id = model
        factories.bring(session, parent, Status.SUCCEEDED)
    asked = {"recipe": "image_classification", "dataset": dataset, "model": parent.id}
    job = client.post("/v1/jobs", json=asked).json()["id"]
    client.post(f"/v1/jobs/{job}/cancel")
    assert client.delete(f"/v1/jobs/{parent.id}").status_code == 200
    new = client.post(f"/v1/jobs/{job}/retry")
    assert (new.status_code, new.json()["spec"]["model"]) == (201, model)


@pytest.mark.parametrize("status", [Status.QUEUED, Status.RUNNING, Status.PAUSED])
def test_a_job_that_has_not_ended_cannot_be_retried(
    client: httpx.Client, caller: Caller, engine: Engine, status: Status
) -> None:
    error = assert_error(client.post(f"/v1/jobs/{make_job(engine, caller, status)}/retry"), 409, "cannot_retry")
    assert error["status"] == status


def test_a_retry_with_a_wrong_body(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = retryable(engine, caller, client, Status.FAILED)
    assert_error(client.post(f"/v1/jobs/{job}/retry", json={"from_checkpiont": True}), 422)
    assert_error(client.post(f"/v1/jobs/{job}/retry", json={"from_checkpoint": "maybe"}), 422)


@pytest.mark.parametrize("status", [Status.QUEUED, Status.STARTING, Status.RUNNING, Status.PAUSED])
def test_only_ended_jobs_are_deleted(client: httpx.Client, caller: Caller, engine: Engine, status: Status) -> None:
    error = assert_error(client.delete(f"/v1/jobs/{make_job(engine, caller, status)}"), 409, "job_not_finished")
    assert error["status"] == status


def test_deleting_lets_everything_go_but_the_tombstone(
    client: httpx.Client, caller: Caller, engine: Engine, blobs: Blobs
) -> None:
    job = make_job(engine, caller, Status.FAILED)
    child = make_job(engine, caller, Status.FAILED, parent_id=job, child_key="1")
    make_checkpoint(engine, blobs, job)
    assert client.delete(f"/v1/jobs/{job}").json() == {"id": job, "object": "job", "deleted": True}
    for one in (job, child):
        for path in ("", "/events", "/metrics", "/checkpoints", "/files"):
            assert_error(client.get(f"/v1/jobs/{one}{path}"), 404)
    assert client.get("/v1/jobs").json()["data"] == []
    assert_error(client.delete(f"/v1/jobs/{job}"), 404)
    with transaction(engine, read_only=True) as session:
        assert session.get_one(tables.Job, job).deleted_at is not None
        for table in (tables.Event, tables.Checkpoint, tables.Attempt):
            assert session.scalars(select(table).where(table.job_id.in_([job, child]))).all() == []


@pytest.mark.parametrize("path", ["", "/cancel", "/stop", "/pause", "/resume", "/retry"])
def test_another_projects_job_is_not_there(
    client: httpx.Client, make_caller: MakeCaller, engine: Engine, path: str
) -> None:
    job = make_job(engine, make_caller())
    answer = client.post(f"/v1/jobs/{job}{path}") if path else client.delete(f"/v1/jobs/{job}")
    assert_error(answer, 404)
    with transaction(engine, read_only=True) as session:
        assert session.get_one(tables.Job, job).status == "queued"
