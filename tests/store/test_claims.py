"""What a worker writes about a job, and that nobody writes who does not hold it."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app.domain.errors import Failure
from app.domain.jobs import Actor, Status, Wanted
from app.store import checkpoints, claims, events, life, sweeps, tables
from app.store.blobs import Blobs, Stored
from app.store.claims import Fenced, Held
from app.store.clock import Now
from app.store.session import transaction
from tests.factories import make_blob, make_dataset, make_job, make_project

pytestmark = pytest.mark.store

CPU = frozenset({"cpu"})
GPU = frozenset({"cpu", "cuda"})
SYSTEM = Failure(fault="system", code="crash", message="The trainer crashed.", retryable=True)
USER = Failure(fault="user", code="diverged", message="The loss is not finite at step 7.")


def take(session: Session, job: tables.Job, *, seconds: float = 30) -> Held:
    """Claim this very job: the queue of a shared test database is everybody's."""
    life.move(session, job, Status.STARTING, actor=Actor.CLAIM, lease=life.Lease("worker", seconds, "poll"))
    return Held(job.id, job.project_id, job.attempt, "worker")


@pytest.fixture
def job(engine: Engine) -> tables.Job:
    with transaction(engine) as session:
        return make_job(session, make_project(session))


@pytest.fixture
def held(engine: Engine, job: tables.Job) -> Held:
    with transaction(engine) as session:
        return take(session, read(session, job))


@pytest.fixture
def blob(engine: Engine, blobs: Blobs) -> Stored:
    return make_blob(engine, blobs)


def read(session: Session, job: tables.Job | Held) -> tables.Job:
    found = life.lock(session, job.id if isinstance(job, tables.Job) else job.job_id)
    assert found is not None
    return found


def look(engine: Engine, job: tables.Job | Held) -> tables.Job:
    with transaction(engine) as session:
        return read(session, job)


def attempts(engine: Engine, held: Held) -> list[tables.Attempt]:
    with transaction(engine) as session:
        query = select(tables.Attempt).where(tables.Attempt.job_id == held.job_id).order_by(tables.Attempt.attempt)
        return list(session.scalars(query))


def codes(engine: Engine, held: Held) -> list[str]:
    with transaction(engine) as session:
        return [event.code for event in events.after(session, held.job_id, 0, 1000)]


def want(engine: Engine, held: Held, wanted: Wanted) -> None:
    with transaction(engine) as session:
        read(session, held).wanted = wanted


def expire(engine: Engine, held: Held) -> None:
    with transaction(engine) as session:
        read(session, held).lease_expires_at = 1.0


def begin(engine: Engine, held: Held, **more: Any) -> None:
    with transaction(engine) as session:
        claims.begin(session, held, **({"plan": {"threads": 1}, "fingerprint": {"torch": "2"}} | more))


def save(engine: Engine, held: Held, blob: Stored, step: int, *, best: bool = False) -> None:
    with transaction(engine) as session:
        claims.write_checkpoint(
            session, held, step=step, epoch=1, metrics={}, best=best, bytes=blob.bytes, sha256=blob.sha256
        )


class TestClaim:
    """Which job is taken."""

    @pytest.fixture
    def queue(self, engine: Engine) -> Callable[..., str | None]:
        """Claim from a queue that holds only the given jobs: the others of the database are put away meanwhile."""

        def claim(
            *jobs: dict[str, Any], devices: frozenset[str] = CPU, gpus_free: int = 0, gpus: int = 0,
            internal: bool = False,
        ):  # fmt: skip
            with Session(engine, expire_on_commit=False) as session, session.begin() as outer:
                session.execute(update(tables.Job).where(tables.Job.status == "queued").values(status="paused"))
                project = make_project(session)
                names = {make_job(session, project, **columns).id: columns.get("name") for columns in jobs}
                found = claims.claim(
                    session, worker="w", source="poll", internal=internal, devices=devices, gpus_free=gpus_free,
                    gpus=gpus, lease_seconds=30,
                )  # fmt: skip
                outer.rollback()
                return names[found[0].job_id] if found else None

        return claim

    def test_priority_goes_before_age(self, queue: Callable[..., str | None]) -> None:
        assert queue({"name": "old"}, {"name": "urgent", "priority": 5}, {"name": "new"}) == "urgent"

    def test_age_decides_among_equals(self, queue: Callable[..., str | None]) -> None:
        assert queue({"name": "old"}, {"name": "new"}) == "old"

    def test_backing_off_is_respected(self, queue: Callable[..., str | None]) -> None:
        assert queue({"name": "later", "not_before": 9e12}, {"name": "now"}) == "now"

    def test_an_empty_queue_gives_nothing(self, queue: Callable[..., str | None]) -> None:
        assert queue() is None
        assert queue({"name": "later", "not_before": 9e12}) is None

    @pytest.mark.parametrize("internal", [True, False])
    def test_the_two_classes_do_not_mix(self, queue: Callable[..., str | None], internal: bool) -> None:
        jobs = ({"name": "False"}, {"name": "True", "internal": True, "kind": "internal", "priority": -1})
        assert queue(*jobs, internal=internal) == str(internal)

    @pytest.mark.parametrize(
        ("device", "gpus", "on_cpu", "one_gpu_free", "no_gpu_free"),
        [
            ("cpu", 1, True, True, True),
            ("auto", 1, True, True, False),
            ("auto", 2, False, False, False),
            ("cuda", 1, False, True, False),
            ("cuda", 2, False, False, False),
        ],
    )
    def test_a_job_goes_only_where_it_fits(
        self, queue: Callable[..., str | None], device: str, gpus: int, on_cpu: bool, one_gpu_free: bool,
        no_gpu_free: bool,
    ) -> None:  # fmt: skip
        job = {"name": "it", "device": device, "gpus": gpus}
        assert (queue(job) == "it") is on_cpu
        assert (queue(job, devices=GPU, gpus_free=1) == "it") is one_gpu_free
        assert (queue(job, devices=GPU, gpus_free=0) == "it") is no_gpu_free
        assert queue({**job, "internal": True, "kind": "internal"}, devices=GPU, internal=True) == "it"

    @pytest.mark.parametrize(
        ("big", "small", "gpus_free", "taken"),
        [
            ({"created_at": 0.0}, {}, 1, None),  # it has waited long enough: the host is kept for it
            ({}, {}, 1, "small"),  # it has not
            ({"created_at": 0.0}, {"priority": 1}, 1, "small"),  # what is more urgent still goes first
            ({"created_at": 0.0}, {"device": "cpu"}, 1, "small"),  # this one takes no GPU from it
            ({"created_at": 0.0, "gpus": 8}, {}, 1, "small"),  # it will never fit this host
            ({"created_at": 0.0}, {}, 4, "big"),  # and now it fits
        ],
    )
    def test_a_big_job_is_not_starved_by_small_ones(
        self, queue: Callable[..., str | None], big: dict[str, Any], small: dict[str, Any], gpus_free: int,
        taken: str | None,
    ) -> None:  # fmt: skip
        jobs = ({"name": "big", "device": "cuda", "gpus": 4, **big}, {"name": "small", "device": "auto", **small})
        assert queue(*jobs, devices=GPU, gpus_free=gpus_free, gpus=4) == taken

    def test_a_claim_takes_a_lease_and_opens_an_attempt(self, engine: Engine, job: tables.Job) -> None:
        with transaction(engine) as session:
            now = session.scalar(select(Now()))
            held = take(session, read(session, job), seconds=30)
        taken = look(engine, job)
        assert (taken.status, taken.attempt, taken.lease_owner) == ("starting", 1, "worker")
        assert taken.lease_expires_at is not None
        assert taken.started_at is not None
        assert now is not None
        assert now + 29 < taken.lease_expires_at < now + 40
        (attempt,) = attempts(engine, held)
        assert (attempt.attempt, attempt.worker, attempt.source, attempt.closed_at) == (1, "worker", "poll", None)


def _every_write(held: Held, blob: Stored) -> dict[str, Callable[[Session], Any]]:
    saved: dict[str, Any] = {"epoch": 0, "metrics": {}, "best": False, "bytes": blob.bytes, "sha256": blob.sha256}
    return {
        "heartbeat": lambda session: claims.heartbeat(session, held, lease_seconds=30),
        "begin": lambda session: claims.begin(session, held, plan={}, fingerprint={}),
        "write_metrics": lambda session: claims.write_metrics(session, held, [("train/loss", 1, 0.5)]),
        "write_event": lambda session: claims.write_event(session, held, code="x", message="x"),
        "write_checkpoint": lambda session: claims.write_checkpoint(session, held, step=1, **saved),
        "may_publish": lambda session: claims.may_publish(session, held),
        "finish": lambda session: claims.finish(session, held, Status.SUCCEEDED),
        "give_up": lambda session: claims.give_up(session, held, SYSTEM),
        "release": lambda session: claims.release(session, held),
        "insert_children": lambda session: claims.insert_children(session, held, []),
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
            claims.finish(session, held, Status.SUCCEEDED)
        else:
            claims.release(session, held)
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
            assert claims.heartbeat(session, held, lease_seconds=30, progress={"fraction": 0.5}) is Wanted.STOP
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
                claims.heartbeat(session, held, lease_seconds=30, progress=progress)
        progress = look(engine, held).progress
        assert progress is not None
        assert progress["fraction"] == 0.5


class TestBegin:
    def test_the_first_plan_stays(self, engine: Engine, held: Held) -> None:
        begin(engine, held, plan={"threads": 1})
        assert look(engine, held).status == "running"
        with transaction(engine) as session:
            claims.release(session, held)
            again = take(session, read(session, held))
        begin(engine, again, plan={"threads": 2}, fingerprint={"torch": "3"})
        job = look(engine, held)
        assert (job.plan, job.exact) == ({"threads": 1}, True)
        assert [attempt.fingerprint for attempt in attempts(engine, held)] == [{"torch": "2"}, {"torch": "3"}]
        with transaction(engine) as session:
            assert claims.first_fingerprint(session, held.job_id) == {"torch": "2"}

    def test_an_attempt_that_died_before_it_began_has_no_fingerprint(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert claims.first_fingerprint(session, held.job_id) is None
            claims.release(session, held)
            again = take(session, read(session, held))
        begin(engine, again, fingerprint={"torch": "3"})
        with transaction(engine) as session:
            assert claims.first_fingerprint(session, held.job_id) == {"torch": "3"}

    def test_a_running_run_may_change_its_own_plan(self, engine: Engine, held: Held) -> None:
        begin(engine, held, plan={"micro_batch": 64})
        begin(engine, held, plan={"micro_batch": 32})
        job = look(engine, held)
        assert (job.plan, job.status) == ({"micro_batch": 32}, "running")
        assert "plan.changed" in codes(engine, held)

    def test_an_inexact_resume_is_said_and_remembered(self, engine: Engine, held: Held) -> None:
        begin(engine, held, exact=False)
        begin(engine, held, exact=True)
        assert look(engine, held).exact is False
        assert codes(engine, held).count("resume.inexact") == 1

    def test_what_was_reported_beyond_the_checkpoint_is_forgotten(self, engine: Engine, held: Held) -> None:
        begin(engine, held)
        with transaction(engine) as session:
            claims.write_metrics(session, held, [("train/loss", step, 1.0) for step in range(10)])
            claims.release(session, held)
            again = take(session, read(session, held))
        begin(engine, again, from_step=6)
        with transaction(engine) as session:
            steps = session.scalars(select(tables.Metric.step).where(tables.Metric.job_id == held.job_id))
            assert sorted(steps) == list(range(7))


def test_a_flush_of_metrics_is_one_event_and_the_latest_values(engine: Engine, held: Held) -> None:
    with transaction(engine) as session:
        claims.write_metrics(session, held, [("train/loss", 1, 2.0), ("train/loss", 2, 1.5), ("lr", 2, 0.1)])
        claims.write_metrics(session, held, [("train/loss", 3, float("nan"))])
        claims.write_metrics(session, held, [])
    job = look(engine, held)
    assert job.metrics == {"train/loss": None, "lr": 0.1}
    with transaction(engine) as session:
        written = [event for event in events.after(session, held.job_id, 0, 100) if event.type == "metric"]
    assert [event.data for event in written] == [
        {"metrics": {"train/loss": [2, 1.5], "lr": [2, 0.1]}}, {"metrics": {"train/loss": [3, None]}},
    ]  # fmt: skip


class TestCheckpoints:
    def test_the_last_two_and_the_best_are_kept(self, engine: Engine, held: Held, blob: Stored) -> None:
        for step, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
            save(engine, held, blob, step, best=best)
        with transaction(engine) as session:
            kept = checkpoints.of_job(session, held.job_id)
            assert [(checkpoint.step, checkpoint.best) for checkpoint in kept] == [(5, False), (4, False), (2, True)]

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


class TestFinish:
    def test_success(self, engine: Engine, held: Held, blob: Stored) -> None:
        begin(engine, held)
        with transaction(engine) as session:
            assert claims.may_publish(session, held)
            status = claims.finish(
                session, held, Status.SUCCEEDED, result={"rows": 3}, metrics={"validation/accuracy": 0.9},
                best={"metric": "validation/accuracy", "value": 0.9, "step": 3}, model_id="mdl_x",
                files=[("grid.png", "image/png", blob.bytes, blob.sha256)],
            )  # fmt: skip
            assert status is Status.SUCCEEDED
        job = look(engine, held)
        assert (job.status, job.model_id, job.result) == ("succeeded", "mdl_x", {"rows": 3})
        assert job.metrics == {"validation/accuracy": 0.9}
        assert job.best == {"metric": "validation/accuracy", "value": 0.9, "step": 3}
        assert job.finished_at is not None
        assert job.lease_owner is None
        assert job.lease_expires_at is None
        (attempt,) = attempts(engine, held)
        assert attempt.outcome == "succeeded"
        assert attempt.closed_at is not None
        with transaction(engine) as session:
            file = session.get_one(tables.JobFile, (held.job_id, "grid.png"))
            assert (file.media_type, file.sha256) == ("image/png", blob.sha256)
            (done,) = [event for event in events.after(session, held.job_id, 0, 100) if event.type == "done"]
            assert done.data["model"] == "mdl_x"

    def test_a_cancel_before_the_last_commit_wins(self, engine: Engine, held: Held, blob: Stored) -> None:
        begin(engine, held)
        want(engine, held, Wanted.CANCEL)
        with transaction(engine) as session:
            assert not claims.may_publish(session, held)
            files = [("grid.png", "image/png", blob.bytes, blob.sha256)]
            assert claims.finish(session, held, Status.SUCCEEDED, result={}, files=files) is Status.CANCELLED
        job = look(engine, held)
        assert (job.status, job.result, job.model_id) == ("cancelled", None, None)
        with transaction(engine) as session:
            assert session.get(tables.JobFile, (held.job_id, "grid.png")) is None

    def test_a_model_of_a_cancelled_job_is_a_mistake_that_is_rolled_back(self, engine: Engine, held: Held) -> None:
        begin(engine, held)
        want(engine, held, Wanted.CANCEL)
        with pytest.raises(ValueError, match="may_publish"), transaction(engine) as session:
            claims.finish(session, held, Status.SUCCEEDED, model_id="mdl_x")
        assert look(engine, held).status == "running"

    @pytest.mark.parametrize("wish", [Wanted.RUN, Wanted.STOP])
    def test_a_wish_that_came_while_pausing_is_not_lost(self, engine: Engine, held: Held, wish: Wanted) -> None:
        want(engine, held, wish)
        with transaction(engine) as session:
            assert claims.finish(session, held, Status.PAUSED) is Status.QUEUED
            assert session.info["wake"] == [(held.job_id, False)]

    def test_pausing_keeps_the_numbers(self, engine: Engine, held: Held) -> None:
        want(engine, held, Wanted.PAUSE)
        with transaction(engine) as session:
            assert claims.finish(session, held, Status.PAUSED, metrics={"train/loss": 1.0}) is Status.PAUSED
        assert look(engine, held).metrics == {"train/loss": 1.0}


class TestGiveUp:
    def test_a_system_failure_is_tried_again_later(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert claims.give_up(session, held, SYSTEM) is Status.QUEUED
            assert "wake" not in session.info or not session.info["wake"]
            now = session.scalar(select(Now()))
        job = look(engine, held)
        assert now is not None
        assert now + 1 < job.not_before < now + 10
        assert (job.losses, job.error, job.status_reason) == (1, None, "retrying")
        (attempt,) = attempts(engine, held)
        assert attempt.outcome == "failed"
        assert attempt.error is not None
        assert attempt.error["code"] == "crash"

    def test_a_user_failure_is_final(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert claims.give_up(session, held, USER) is Status.FAILED
        job = look(engine, held)
        assert job.error is not None
        assert (job.error["class"], job.error["code"], job.status_reason) == ("user", "diverged", "diverged")

    def test_the_third_in_a_row_is_final(self, engine: Engine, held: Held) -> None:
        statuses = []
        for _ in range(3):
            with transaction(engine) as session:
                statuses.append(claims.give_up(session, held, SYSTEM))
                if statuses[-1] is Status.QUEUED:
                    held = take(session, read(session, held))
        assert statuses == [Status.QUEUED, Status.QUEUED, Status.FAILED]

    def test_a_cancel_wins_over_a_failure(self, engine: Engine, held: Held) -> None:
        want(engine, held, Wanted.CANCEL)
        with transaction(engine) as session:
            assert claims.give_up(session, held, USER) is Status.CANCELLED

    def test_max_attempts_counts_losses_but_no_drains(self, engine: Engine, held: Held, blob: Stored) -> None:
        with transaction(engine) as session:
            read(session, held).max_attempts = 3
        for _ in range(5):
            with transaction(engine) as session:
                assert claims.release(session, held) is Status.QUEUED
                held = take(session, read(session, held))
        statuses = []
        while Status.FAILED not in statuses:
            save(engine, held, blob, 1)  # so that it is not the row of losses that ends it
            with transaction(engine) as session:
                statuses.append(claims.give_up(session, held, SYSTEM))
                if statuses[-1] is Status.QUEUED:
                    held = take(session, read(session, held))
        assert len(statuses) == 3


class TestRelease:
    def test_a_drained_job_is_queued_at_once_and_nothing_is_counted(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert claims.release(session, held) is Status.QUEUED
            assert session.info["wake"] == [(held.job_id, False)]
        job = look(engine, held)
        assert (job.losses, job.not_before, job.status_reason, job.lease_owner) == (0, 0.0, "drained", None)

    @pytest.mark.parametrize(
        ("wish", "checkpoint", "status"),
        [
            (Wanted.CANCEL, True, Status.CANCELLED),
            (Wanted.PAUSE, False, Status.PAUSED),
            (Wanted.STOP, True, Status.QUEUED),
            (Wanted.STOP, False, Status.CANCELLED),
        ],
    )
    def test_a_wish_is_honoured_on_the_way_out(
        self, engine: Engine, held: Held, blob: Stored, wish: Wanted, checkpoint: bool, status: Status
    ) -> None:
        if checkpoint:
            save(engine, held, blob, 1)
        want(engine, held, wish)
        with transaction(engine) as session:
            assert claims.release(session, held) is status


class TestSweep:
    def test_a_lost_job_goes_on_elsewhere(self, engine: Engine, held: Held) -> None:
        expire(engine, held)
        with transaction(engine) as session:
            assert (held.job_id, False) in sweeps.sweep(session, limit=10_000)
        job = look(engine, held)
        assert (job.status, job.status_reason, job.losses, job.lease_owner) == ("queued", "worker_lost", 1, None)
        (attempt,) = attempts(engine, held)
        assert attempt.outcome == "lost"

    def test_a_held_job_is_left_alone(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            sweeps.sweep(session, limit=10_000)
        assert look(engine, held).status == "starting"

    def test_three_losses_end_the_job(self, engine: Engine, held: Held) -> None:
        for _ in range(3):
            expire(engine, held)
            with transaction(engine) as session:
                sweeps.sweep(session, limit=10_000)
                if read(session, held).status == "queued":
                    held = take(session, read(session, held))
        job = look(engine, held)
        assert job.error is not None
        assert (job.status, job.error["code"]) == ("failed", "crash_loop")
        assert codes(engine, held)[-2:] == ["failed", "failed"]

    @pytest.mark.parametrize(
        ("wish", "status"), [(Wanted.CANCEL, "cancelled"), (Wanted.PAUSE, "paused"), (Wanted.STOP, "cancelled")]
    )
    def test_the_wish_of_a_lost_job_is_honoured(self, engine: Engine, held: Held, wish: Wanted, status: str) -> None:
        want(engine, held, wish)
        expire(engine, held)
        with transaction(engine) as session:
            sweeps.sweep(session, limit=10_000)
        assert look(engine, held).status == status

    def test_a_wait_that_nobody_settled_is_settled(self, engine: Engine, held: Held) -> None:
        """As when two rows were locked by others at the moment of the end."""
        with transaction(engine) as session:
            project = session.get_one(tables.Project, held.project_id)
            claims.finish(session, held, Status.SUCCEEDED, model_id="mdl_made")
            waiting = make_job(session, project, status="waiting", wait_for_job_id=held.job_id)
        with transaction(engine) as session:
            assert (waiting.id, False) in sweeps.sweep(session, limit=10_000)
        job = look(engine, waiting)
        assert (job.status, job.base_model_id) == ("queued", "mdl_made")

    def test_a_round_that_nobody_closed_is_closed(self, engine: Engine) -> None:
        with transaction(engine) as session:
            project = make_project(session)
            closed, open_ = (make_job(session, project, status="waiting") for _ in range(2))
            for parent, statuses in ((closed, ("failed", "succeeded")), (open_, ("failed", "paused"))):
                for key, status in enumerate(statuses):
                    child = make_job(session, project, parent_id=parent.id, child_key=str(key))
                    session.execute(update(tables.Job).where(tables.Job.id == child.id).values(status=status))
        with transaction(engine) as session:
            woken = sweeps.sweep(session, limit=10_000)
        assert (closed.id, False) in woken
        assert (open_.id, False) not in woken
        assert (look(engine, closed).status, look(engine, open_).status) == ("queued", "waiting")

    def test_what_expired_is_forgotten_and_what_is_used_is_not(self, engine: Engine, blob: Stored) -> None:
        with transaction(engine) as session:
            project = make_project(session)
            fresh, old, used = (
                tables.Upload(id=f"upl_{name}_{project.id}", project_id=project.id, bytes=1, sha256=blob.sha256,
                              expires_at=expires)
                for name, expires in (("f", 9e12), ("o", 1.0), ("u", 1.0))
            )  # fmt: skip
            session.add_all([fresh, old, used])
            session.flush()
            make_dataset(session, project, upload_id=used.id)
            for key, created in (("old", 1.0), ("new", Now())):
                session.add(
                    tables.Idempotency(
                        project_id=project.id, route="POST /v1/jobs", key=key, fingerprint="0" * 64, created_at=created
                    )
                )
        with transaction(engine) as session:
            sweeps.sweep(session)
        with transaction(engine) as session:
            uploads = session.scalars(select(tables.Upload.id).where(tables.Upload.project_id == project.id))
            assert set(uploads) == {fresh.id, used.id}
            answers = session.scalars(select(tables.Idempotency.key).where(tables.Idempotency.project_id == project.id))
            assert list(answers) == ["new"]
