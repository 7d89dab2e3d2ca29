"""What a worker writes about a job while it holds it, and that nobody writes who does not."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.domain.errors import Failure
from app.domain.jobs import Status, Wanted
from app.store import attempts, checkpoints, endings, events, ids, tables
from app.store.attempts import Fenced, Held
from app.store.blobs import Stored
from app.store.clock import Now
from app.store.session import transaction
from tests.factories import make_job
from tests.store.holding import attempts_of, begin, codes, expire, look, read, save, take, want

pytestmark = pytest.mark.store

SYSTEM = Failure(fault="system", code="crash", message="The trainer crashed.", retryable=True)


def _every_write(held: Held, blob: Stored) -> dict[str, Callable[[Session], Any]]:
    saved: dict[str, Any] = {"epoch": 0, "metrics": {}, "best_step": None, "bytes": blob.bytes, "sha256": blob.sha256}
    return {
        "heartbeat": lambda session: attempts.heartbeat(session, held, lease_seconds=30),
        "begin": lambda session: attempts.begin(session, held, plan={}, fingerprint={}),
        "write_metrics": lambda session: attempts.write_metrics(session, held, [("train/loss", 1, 0.5)]),
        "write_event": lambda session: attempts.write_event(session, held, code="x", message="x"),
        "write_checkpoint": lambda session: attempts.write_checkpoint(session, held, step=1, **saved),
        "may_publish": lambda session: endings.may_publish(session, held),
        "finish": lambda session: endings.finish(session, held, Status.SUCCEEDED),
        "give_up": lambda session: endings.give_up(session, held, SYSTEM),
        "release": lambda session: endings.release(session, held),
        "insert_children": lambda session: endings.insert_children(session, held, []),
    }


WRITES = ("heartbeat", "begin", "write_metrics", "write_event", "write_checkpoint", "may_publish", "finish", "give_up",
          "release", "insert_children")  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("why", ["taken over", "released", "ended", "other worker"])
def test_no_stale_write_is_accepted(engine: Engine, held: Held, blob: Stored, write: str, why: str) -> None:
    stale = held
    with transaction(engine) as session:
        if why == "other worker":
            stale = Held(held.job_id, held.project_id, held.attempt, "somebody else")
        elif why == "ended":
            endings.finish(session, held, Status.SUCCEEDED)
        else:
            endings.release(session, held)
            if why == "taken over":
                take(session, read(session, held))
    before = _everything(engine, held)
    with pytest.raises(Fenced), transaction(engine) as session:
        _every_write(stale, blob)[write](session)
    assert _everything(engine, held) == before


@pytest.mark.parametrize("write", WRITES)
def test_the_same_write_is_accepted_from_the_holder(engine: Engine, held: Held, blob: Stored, write: str) -> None:
    """Otherwise the test above could not fail. The lease may be over, as long as nobody took the job."""
    expire(engine, held)
    with transaction(engine) as session:
        _every_write(held, blob)[write](session)


def _everything(engine: Engine, held: Held) -> list[Any]:
    with transaction(engine) as session:
        rows: list[Any] = []
        for table in (tables.Job, tables.Attempt, tables.Event, tables.Metric, tables.Checkpoint):
            key = table.__table__.c.id if table is tables.Job else table.__table__.c.job_id
            rows += [str(row) for row in session.execute(select(table.__table__).where(key == held.job_id))]
        return sorted(rows)


class TestHeartbeat:
    def test_it_extends_the_lease_and_says_what_is_wanted(self, engine: Engine, held: Held) -> None:
        expire(engine, held)
        want(engine, held, Wanted.STOP)
        with transaction(engine) as session:
            assert attempts.heartbeat(session, held, lease_seconds=30, progress={"fraction": 0.5}) is Wanted.STOP
            now = session.scalar(select(Now()))
        job = look(engine, held)
        assert now is not None
        assert job.lease_expires_at is not None
        assert job.lease_expires_at > now + 20
        assert job.progress is not None
        assert job.progress["fraction"] == 0.5
        assert abs(job.progress["updated_at"] - now) < 5

    def test_without_progress_the_last_one_stays(self, engine: Engine, held: Held) -> None:
        for progress in ({"fraction": 0.5}, None):
            with transaction(engine) as session:
                attempts.heartbeat(session, held, lease_seconds=30, progress=progress)
        progress = look(engine, held).progress
        assert progress is not None
        assert progress["fraction"] == 0.5


class TestBegin:
    def test_the_first_plan_stays(self, engine: Engine, held: Held) -> None:
        begin(engine, held, plan={"threads": 1})
        assert look(engine, held).status == "running"
        with transaction(engine) as session:
            endings.release(session, held)
            again = take(session, read(session, held))
        begin(engine, again, plan={"threads": 2}, fingerprint={"torch": "3"})
        job = look(engine, held)
        assert (job.plan, job.exact) == ({"threads": 1}, True)
        assert [attempt.fingerprint for attempt in attempts_of(engine, held)] == [{"torch": "2"}, {"torch": "3"}]

    def test_a_running_run_may_change_its_own_plan(self, engine: Engine, held: Held) -> None:
        begin(engine, held, plan={"micro_batch": 64})
        begin(engine, held, plan={"micro_batch": 32})
        job = look(engine, held)
        assert (job.plan, job.status) == ({"micro_batch": 32}, "running")
        assert "plan.changed" in codes(engine, held)

    def test_an_inexact_resume_is_remembered_and_said_by_the_trainer_alone(self, engine: Engine, held: Held) -> None:
        begin(engine, held, exact=False)
        begin(engine, held, exact=True)
        assert look(engine, held).exact is False
        assert "resume.inexact" not in codes(engine, held), "the trainer's event, which says what differs, comes too"

    def test_what_was_reported_beyond_the_checkpoint_is_forgotten(self, engine: Engine, held: Held) -> None:
        begin(engine, held)
        with transaction(engine) as session:
            attempts.write_metrics(session, held, [("train/loss", step, 1.0) for step in range(10)])
            endings.release(session, held)
            again = take(session, read(session, held))
        begin(engine, again, from_step=6)
        with transaction(engine) as session:
            steps = session.scalars(select(tables.Metric.step).where(tables.Metric.job_id == held.job_id))
            assert sorted(steps) == list(range(7))


def test_a_flush_of_metrics_is_one_event_and_the_latest_values(engine: Engine, held: Held) -> None:
    with transaction(engine) as session:
        attempts.write_metrics(session, held, [("train/loss", 1, 2.0), ("train/loss", 2, 1.5), ("lr", 2, 0.1)])
        attempts.write_metrics(session, held, [("train/loss", 3, float("nan"))])
        attempts.write_metrics(session, held, [])
    job = look(engine, held)
    assert job.metrics == {"train/loss": None, "lr": 0.1}
    with transaction(engine) as session:
        written = [event for event in events.after(session, held.job_id, 0, 100) if event.type == "metric"]
    assert [event.data for event in written] == [
        {"metrics": {"train/loss": [2, 1.5], "lr": [2, 0.1]}}, {"metrics": {"train/loss": [3, None]}},
    ]  # fmt: skip


class TestCheckpoints:
    def test_the_last_two_and_the_best_are_kept(self, engine: Engine, held: Held, blob: Stored) -> None:
        for step, best_step in ((1, 1), (2, 2), (3, 2), (4, 2), (5, None)):
            save(engine, held, blob, step, best_step=best_step)
        with transaction(engine) as session:
            kept = checkpoints.of_job(session, held.job_id)
            assert [(checkpoint.step, checkpoint.best) for checkpoint in kept] == [(5, False), (4, False), (2, True)]

    def test_what_was_best_until_a_better_step_that_was_not_saved_is_best_no_more(
        self, engine: Engine, held: Held, blob: Stored
    ) -> None:
        for step, best_step in ((3, 3), (9, 6), (12, 6)):
            save(engine, held, blob, step, best_step=best_step)
        with transaction(engine) as session:
            kept = checkpoints.of_job(session, held.job_id)
            assert [(checkpoint.step, checkpoint.best) for checkpoint in kept] == [(12, False), (9, False)]
            written = [event for event in events.after(session, held.job_id, 0, 100) if event.type == "checkpoint"]
        assert [event.data["best"] for event in written] == [True, False, False]

    def test_the_newest_is_that_of_the_last_step_whatever_the_clock_says(
        self, engine: Engine, held: Held, blob: Stored, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for step in (1, 2):
            save(engine, held, blob, step)
        with transaction(engine) as session:
            endings.release(session, held)
            again = take(session, read(session, held))
        monkeypatch.setattr(ids, "_last", 0)
        monkeypatch.setattr(ids.time, "time_ns", lambda: 10**18)  # another host, whose clock is years behind
        for step in (3, 4):
            save(engine, again, blob, step)
        with transaction(engine) as session:
            assert [checkpoint.step for checkpoint in checkpoints.of_job(session, held.job_id)] == [4, 3]

    def test_the_same_step_of_one_attempt_is_listed_once(self, engine: Engine, held: Held, blob: Stored) -> None:
        save(engine, held, blob, 1)
        save(engine, held, blob, 1)
        with transaction(engine) as session:
            assert [checkpoint.step for checkpoint in checkpoints.of_job(session, held.job_id)] == [1]

    def test_a_checkpoint_ends_a_row_of_losses(self, engine: Engine, held: Held, blob: Stored) -> None:
        with transaction(engine) as session:
            read(session, held).losses = 2
        save(engine, held, blob, 1)
        assert look(engine, held).losses == 0
        assert "checkpoint" in codes(engine, held)

    def test_a_retry_starts_from_its_own_or_from_the_one_it_was_given(
        self, engine: Engine, held: Held, blob: Stored
    ) -> None:
        save(engine, held, blob, 7)
        with transaction(engine) as session:
            (given,) = checkpoints.of_job(session, held.job_id)
            project = session.get_one(tables.Project, held.project_id)
            retry = make_job(session, project, retry_of=held.job_id, resume_from=given.id)
            assert checkpoints.exist(session, retry)
            assert [checkpoint.id for checkpoint in checkpoints.to_resume(session, retry)] == [given.id]
            retried = take(session, retry)
        save(engine, retried, blob, 9)
        with transaction(engine) as session:
            found = checkpoints.to_resume(session, read(session, retried))
            assert [checkpoint.step for checkpoint in found] == [9, 7]
            checkpoints.discard(session, found[0].id)
            found = checkpoints.to_resume(session, read(session, retried))
            assert [checkpoint.step for checkpoint in found] == [7]
