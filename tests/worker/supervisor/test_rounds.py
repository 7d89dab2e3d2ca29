"""Jobs made of other jobs, on one worker: each child is made once, whatever dies."""

from typing import Any

import pytest
from sqlalchemy import Engine, select

from app.domain.jobs import Status
from app.store import attempts, children, claims, endings, jobs, recipes, tables
from app.store.session import transaction
from tests import fakes
from tests.factories import make_dataset, make_job, make_project
from tests.worker.supervisor.hosting import events_of, job_of, set_job
from worker.supervisor.host import Host
from worker.supervisor.work import work

pytestmark = pytest.mark.worker


def submit_orchestrator(engine: Engine, **fake: Any) -> str:
    with transaction(engine) as session:
        recipes.publish(session, fakes.published())
        project = make_project(session)
        dataset = make_dataset(session, project)
        spec = {"recipe": "fake", "dataset": dataset.id, "params": {"fake": {"children": 4, **fake}}}
        return make_job(session, project, spec=spec, recipe="fake", dataset_id=dataset.id).id


def children_of(engine: Engine, job_id: str) -> list[tables.Job]:
    with transaction(engine, read_only=True) as session:
        return list(session.scalars(select(tables.Job).where(tables.Job.parent_id == job_id).order_by(tables.Job.id)))


def go_on(host: Host, job_id: str) -> None:
    """Run the next attempt now, and whatever follows from it."""
    set_job(host.engine, job_id, not_before=0.0)
    assert work(host, "poll", internal=False) >= 1


def claim_and_insert(host: Host) -> attempts.Held:
    """Bring an orchestrating job to where it waits for its first two children."""
    with transaction(host.engine) as session:
        found = claims.claim(
            session, worker="wrk_test", source="poll", internal=False, devices=frozenset({"cpu"}), gpus_free=0,
            lease_seconds=60,
        )  # fmt: skip
        assert found is not None
        held, parent = found
        body = {"recipe": "fake", "dataset": parent.dataset_id, "model": {"architecture": "small_cnn"}}
        endings.insert_children(session, held, [{"child_key": key, **body} for key in ("a", "b")])
        return held


def test_an_orchestrating_job_runs_its_children_on_the_only_slot(host: Host) -> None:
    job_id = submit_orchestrator(host.engine, failing_child=1)
    assert work(host, "poll", internal=False) == 7, "the parent three times, and four children between"
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 3)
    assert job.result == {"0": "succeeded", "1": "failed", "2": "succeeded", "3": "succeeded"}
    assert [(child.child_key, child.project_id) for child in children_of(host.engine, job_id)] == [
        (key, job.project_id) for key in "0123"
    ]
    moves = [event.code for event in events_of(host.engine, job_id) if event.type == "status"]
    assert moves == ["queued", "starting", "running", "waiting", "queued", "starting", "running", "waiting", "queued",
                     "starting", "running", "succeeded"]  # fmt: skip


@pytest.mark.parametrize("kill_at", [0, 2, 4])  # before the first round, before the second, before the result
def test_a_killed_orchestrator_makes_no_child_twice(host: Host, kill_at: int) -> None:
    job_id = submit_orchestrator(host.engine, kill_at=kill_at, faulty_attempts=kill_at // 2 + 1)
    work(host, "poll", internal=False)
    while job_of(host.engine, job_id).status == Status.QUEUED:
        go_on(host, job_id)
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 4)
    assert [child.child_key for child in children_of(host.engine, job_id)] == list("0123")
    assert all(child.attempt == 1 for child in children_of(host.engine, job_id))


def test_a_supervisor_lost_in_the_middle_of_inserting_inserts_nothing_twice(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit_orchestrator(host.engine)
    make, calls = children.make, list[Any]()

    def dies_at_the_second(*given: Any) -> tables.Job:
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("the supervisor died")
        return make(*given)

    monkeypatch.setattr(children, "make", dies_at_the_second)
    work(host, "poll", internal=False)
    assert children_of(host.engine, job_id) == [], "a round is inserted as a whole"
    monkeypatch.undo()
    assert job_of(host.engine, job_id).status == Status.QUEUED
    go_on(host, job_id)
    assert job_of(host.engine, job_id).status == Status.SUCCEEDED
    assert [child.child_key for child in children_of(host.engine, job_id)] == list("0123")


@pytest.mark.parametrize("when", ["waiting", "planning"])
def test_a_stopped_orchestrator_gathers_what_is_there(host: Host, when: str) -> None:
    job_id = submit_orchestrator(host.engine)
    held = claim_and_insert(host) if when == "waiting" else None
    project = job_of(host.engine, job_id).project_id
    if held is None:  # the wish comes while the first round is planned: it is not even inserted
        set_job(host.engine, job_id, wanted="stop")
    else:
        with transaction(host.engine) as session:
            jobs.request(session, project, job_id, "stop")
    assert work(host, "poll", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert job.status == Status.STOPPED
    assert job.result == ({"a": "cancelled", "b": "cancelled"} if held else {})
    assert len(children_of(host.engine, job_id)) == (2 if held else 0)


def test_a_cancelled_orchestrator_takes_its_children_along(host: Host) -> None:
    job_id = submit_orchestrator(host.engine)
    held = claim_and_insert(host)
    with transaction(host.engine) as session:
        jobs.request(session, held.project_id, job_id, "cancel")
    assert work(host, "poll", internal=False) == 0, "nothing is left to run"
    assert job_of(host.engine, job_id).status == Status.CANCELLED
    assert [child.status for child in children_of(host.engine, job_id)] == [Status.CANCELLED] * 2
