"""How an attempt ends: well, badly, or handed back."""

import pytest
from sqlalchemy import Engine, select

from app.domain.errors import Failure
from app.domain.jobs import Status, Wanted
from app.store import endings, events, tables
from app.store.attempts import Held
from app.store.blobs import Stored
from app.store.clock import Now
from app.store.session import transaction
from tests.store.holding import attempts_of, begin, look, read, save, take, want

pytestmark = pytest.mark.store

SYSTEM = Failure(fault="system", code="crash", message="The trainer crashed.", retryable=True)
USER = Failure(fault="user", code="diverged", message="The loss is not finite at step 7.")


class TestFinish:
    def test_success(self, engine: Engine, held: Held, blob: Stored) -> None:
        begin(engine, held)
        with transaction(engine) as session:
            assert endings.may_publish(session, held)
            status = endings.finish(
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
        (attempt,) = attempts_of(engine, held)
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
            assert not endings.may_publish(session, held)
            files = [("grid.png", "image/png", blob.bytes, blob.sha256)]
            assert endings.finish(session, held, Status.SUCCEEDED, result={}, files=files) is Status.CANCELLED
        job = look(engine, held)
        assert (job.status, job.result, job.model_id) == ("cancelled", None, None)
        with transaction(engine) as session:
            assert session.get(tables.JobFile, (held.job_id, "grid.png")) is None

    def test_a_model_of_a_cancelled_job_is_a_mistake_that_is_rolled_back(self, engine: Engine, held: Held) -> None:
        begin(engine, held)
        want(engine, held, Wanted.CANCEL)
        with pytest.raises(ValueError, match="may_publish"), transaction(engine) as session:
            endings.finish(session, held, Status.SUCCEEDED, model_id="mdl_x")
        assert look(engine, held).status == "running"

    @pytest.mark.parametrize("wish", [Wanted.RUN, Wanted.STOP])
    def test_a_wish_that_came_while_pausing_is_not_lost(self, engine: Engine, held: Held, wish: Wanted) -> None:
        want(engine, held, wish)
        with transaction(engine) as session:
            assert endings.finish(session, held, Status.PAUSED) is Status.QUEUED
            assert session.info["wake"] == [(held.job_id, False)]

    def test_pausing_keeps_the_numbers(self, engine: Engine, held: Held) -> None:
        want(engine, held, Wanted.PAUSE)
        with transaction(engine) as session:
            assert endings.finish(session, held, Status.PAUSED, metrics={"train/loss": 1.0}) is Status.PAUSED
        assert look(engine, held).metrics == {"train/loss": 1.0}


class TestGiveUp:
    def test_a_system_failure_is_tried_again_later(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert endings.give_up(session, held, SYSTEM) is Status.QUEUED
            assert "wake" not in session.info or not session.info["wake"]
            now = session.scalar(select(Now()))
        job = look(engine, held)
        assert now is not None
        assert now + 1 < job.not_before < now + 10
        assert (job.losses, job.error, job.status_reason) == (1, None, "retrying")
        (attempt,) = attempts_of(engine, held)
        assert attempt.outcome == "failed"
        assert attempt.error is not None
        assert attempt.error["code"] == "crash"

    def test_a_user_failure_is_final(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert endings.give_up(session, held, USER) is Status.FAILED
        job = look(engine, held)
        assert job.error is not None
        assert (job.error["class"], job.error["code"], job.status_reason) == ("user", "diverged", "diverged")

    def test_the_third_in_a_row_is_final(self, engine: Engine, held: Held) -> None:
        statuses = []
        for _ in range(3):
            with transaction(engine) as session:
                statuses.append(endings.give_up(session, held, SYSTEM))
                if statuses[-1] is Status.QUEUED:
                    held = take(session, read(session, held))
        assert statuses == [Status.QUEUED, Status.QUEUED, Status.FAILED]

    def test_a_cancel_wins_over_a_failure(self, engine: Engine, held: Held) -> None:
        want(engine, held, Wanted.CANCEL)
        with transaction(engine) as session:
            assert endings.give_up(session, held, USER) is Status.CANCELLED

    def test_max_attempts_counts_losses_but_no_drains(self, engine: Engine, held: Held, blob: Stored) -> None:
        with transaction(engine) as session:
            read(session, held).max_attempts = 3
        for _ in range(5):
            with transaction(engine) as session:
                assert endings.release(session, held) is Status.QUEUED
                held = take(session, read(session, held))
        statuses = []
        while Status.FAILED not in statuses:
            save(engine, held, blob, 1)  # so that it is not the row of losses that ends it
            with transaction(engine) as session:
                statuses.append(endings.give_up(session, held, SYSTEM))
                if statuses[-1] is Status.QUEUED:
                    held = take(session, read(session, held))
        assert len(statuses) == 3


class TestRelease:
    def test_a_drained_job_is_queued_at_once_and_nothing_is_counted(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            assert endings.release(session, held) is Status.QUEUED
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
            assert endings.release(session, held) is status
