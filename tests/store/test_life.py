"""The one function that moves a job, and what follows from a move for others."""

import inspect
import sys

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.domain.errors import Conflict, Failure
from app.domain.jobs import Actor, Status, Wanted
from app.store import events, life, tables
from app.store.session import transaction
from tests.factories import make_dataset, make_job, make_model, make_project
from tests.store.moving import LEASE, RUN, act, log, look, move

pytestmark = pytest.mark.store

FAILURE = Failure(fault="data", code="invalid_data", message="Row 3 is not an image.")


@pytest.fixture
def project(engine: Engine) -> tables.Project:
    with transaction(engine) as session:
        return make_project(session)


@pytest.fixture
def job(engine: Engine, project: tables.Project) -> tables.Job:
    with transaction(engine) as session:
        return make_job(session, project)


class TestInsert:
    def test_a_queued_job_has_its_first_event_and_is_announced(self, engine: Engine, project: tables.Project) -> None:
        with transaction(engine) as session:
            job = make_job(session, project)
            assert session.info["wake"] == [(job.id, False)]
        (event,) = log(engine, job)
        assert (event.number, event.type, event.code, event.data) == (1, "status", "queued", {"status": "queued"})

    def test_a_waiting_job_is_not_announced(self, engine: Engine, project: tables.Project) -> None:
        with transaction(engine) as session:
            make_job(session, project, status="waiting")
            assert "wake" not in session.info

    @pytest.mark.parametrize("status", ["starting", "running", "succeeded", "paused"])
    def test_no_job_begins_in_the_middle(self, engine: Engine, project: tables.Project, status: str) -> None:
        with pytest.raises(Conflict, match="cannot begin"), transaction(engine) as session:
            make_job(session, project, status=status)


class TestMove:
    def test_a_whole_life_is_told_without_holes(self, engine: Engine, job: tables.Job) -> None:
        move(engine, job, *RUN, Status.SUCCEEDED)
        told = [(event.number, event.type, event.code) for event in log(engine, job)]
        assert told == [
            (1, "status", "queued"), (2, "status", "starting"), (3, "status", "running"), (4, "status", "succeeded"),
            (5, "done", "succeeded"),
        ]  # fmt: skip
        assert look(engine, job).last_event == 5

    def test_who_may_not_move_it_is_refused_with_the_present_status(self, engine: Engine, job: tables.Job) -> None:
        with pytest.raises(Conflict) as refusal:
            act(engine, job, lambda session, fresh: life.move(session, fresh, Status.SUCCEEDED, actor=Actor.WORKER))
        assert refusal.value.facts == {"status": "queued"}
        assert len(log(engine, job)) == 1

    def test_of_two_who_saw_the_same_status_only_one_moves_it(self, engine: Engine, job: tables.Job) -> None:
        seen = look(engine, job)
        move(engine, job, Status.PAUSED)
        with pytest.raises(Conflict) as refusal, transaction(engine) as session:
            life.move(session, session.merge(seen, load=False), Status.CANCELLED, actor=Actor.API)
        assert refusal.value.code == "changed_meanwhile"
        assert look(engine, job).status == "paused"

    def test_of_two_attempts_that_saw_the_same_status_only_the_present_one_moves_it(
        self, engine: Engine, job: tables.Job
    ) -> None:
        move(engine, job, *RUN)
        seen = look(engine, job)
        move(engine, job, Status.QUEUED, *RUN)
        with pytest.raises(Conflict), transaction(engine) as session:
            life.move(session, session.merge(seen, load=False), Status.SUCCEEDED, actor=Actor.WORKER)
        assert look(engine, job).status == "running"

    def test_a_lease_comes_with_the_claim_and_goes_with_the_hold(self, engine: Engine, job: tables.Job) -> None:
        move(engine, job, *RUN)
        assert look(engine, job).lease_owner == "worker"
        move(engine, job, Status.PAUSED)
        released = look(engine, job)
        assert (released.lease_owner, released.lease_expires_at) == (None, None)

    @pytest.mark.parametrize(("after", "lease"), [(Status.STARTING, None), (Status.PAUSED, LEASE)])
    def test_a_lease_is_taken_only_by_a_claim(
        self, engine: Engine, job: tables.Job, after: Status, lease: life.Lease | None
    ) -> None:
        actor = Actor.CLAIM if after is Status.STARTING else Actor.API
        with pytest.raises(ValueError, match="lease"):
            act(engine, job, lambda session, fresh: life.move(session, fresh, after, actor=actor, lease=lease))

    def test_the_times_of_a_life(self, engine: Engine, job: tables.Job) -> None:
        move(engine, job, *RUN)
        first = look(engine, job)
        move(engine, job, Status.QUEUED, *RUN)
        assert look(engine, job).started_at == first.started_at
        assert look(engine, job).finished_at is None
        move(engine, job, Status.STOPPED)
        ended = look(engine, job)
        assert ended.finished_at is not None
        assert first.started_at is not None
        assert ended.created_at <= first.started_at <= ended.finished_at

    def test_a_reason_does_not_outlive_its_status(self, engine: Engine, job: tables.Job) -> None:
        move(engine, job, *RUN)
        act(
            engine,
            job,
            lambda session, fresh: life.move(
                session, fresh, Status.QUEUED, actor=Actor.SWEEP, reason="worker_lost", counts_as_loss=True
            ),
        )
        assert (look(engine, job).status_reason, look(engine, job).losses) == ("worker_lost", 1)
        move(engine, job, *RUN)
        assert look(engine, job).status_reason is None

    def test_a_wish_is_written_with_the_move(self, engine: Engine, job: tables.Job) -> None:
        act(
            engine,
            job,
            lambda session, fresh: life.move(session, fresh, Status.CANCELLED, actor=Actor.API, wanted=Wanted.CANCEL),
        )
        assert look(engine, job).wanted == "cancel"

    def test_a_failure_is_stored_and_told(self, engine: Engine, job: tables.Job) -> None:
        move(engine, job, *RUN)
        move(engine, job, Status.FAILED, failure=FAILURE)
        failed = look(engine, job)
        assert (failed.error, failed.status_reason) == (FAILURE.to_json(), "invalid_data")
        done = log(engine, job)[-1]
        assert (done.type, done.level, done.data["error"]) == ("done", "error", FAILURE.to_json())
        assert "Row 3" in done.message

    def test_what_can_be_claimed_now_is_announced_and_what_cannot_is_not(self, engine: Engine, job: tables.Job) -> None:
        assert move(engine, job, Status.PAUSED) == []
        assert move(engine, job, Status.QUEUED) == [(job.id, False)]
        move(engine, job, *RUN)
        _, wake = act(
            engine,
            job,
            lambda session, fresh: life.move(session, fresh, Status.QUEUED, actor=Actor.WORKER, delay_seconds=8),
        )
        assert wake == []

    def test_a_move_that_is_rolled_back_never_happened(self, engine: Engine, job: tables.Job) -> None:
        def step(session: Session, fresh: tables.Job) -> None:
            life.move(session, fresh, Status.CANCELLED, actor=Actor.API)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            act(engine, job, step)
        assert look(engine, job).status == "queued"
        assert [event.number for event in log(engine, job)] == [1]


class TestThoseWhoWait:
    def _dependant(self, engine: Engine, project: tables.Project, on: tables.Job) -> tables.Job:
        with transaction(engine) as session:
            return make_job(session, project, status="waiting", wait_for_job_id=on.id)

    def test_they_start_from_the_model_that_was_made(
        self, engine: Engine, project: tables.Project, job: tables.Job
    ) -> None:
        first, second = self._dependant(engine, project, job), self._dependant(engine, project, job)
        move(engine, job, *RUN)

        def stop(session: Session, fresh: tables.Job) -> None:
            fresh.model_id = "mdl_made"
            life.move(session, fresh, Status.STOPPED, actor=Actor.WORKER)

        _, wake = act(engine, job, stop)
        assert set(wake) == {(first.id, False), (second.id, False)}
        for dependant in (first, second):
            freed = look(engine, dependant)
            assert (freed.status, freed.base_model_id) == ("queued", "mdl_made")

    def test_without_a_model_a_whole_chain_fails(
        self, engine: Engine, project: tables.Project, job: tables.Job
    ) -> None:
        """However long it is: a recursion would need a stack as deep as the chain."""
        chain = [job]
        with transaction(engine) as session:
            for _ in range(100):
                chain.append(make_job(session, project, status="waiting", wait_for_job_id=chain[-1].id))
        usual = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack(0)) + 100)
        try:
            move(engine, job, Status.CANCELLED)
        finally:
            sys.setrecursionlimit(usual)
        waited = select(tables.Job.status, tables.Job.status_reason).where(
            tables.Job.project_id == project.id, tables.Job.wait_for_job_id.is_not(None)
        )
        with transaction(engine) as session:
            found = session.execute(waited).all()
        assert set(found) == {("failed", "parent_failed")}
        assert len(found) == 100

    def test_one_that_is_no_longer_waiting_is_left_alone(
        self, engine: Engine, project: tables.Project, job: tables.Job
    ) -> None:
        dependant = self._dependant(engine, project, job)
        move(engine, dependant, Status.CANCELLED)
        move(engine, job, Status.CANCELLED)
        assert look(engine, dependant).status == "cancelled"

    def test_a_row_that_somebody_holds_is_left_to_the_sweep(
        self, engine: Engine, project: tables.Project, job: tables.Job
    ) -> None:
        if engine.dialect.name == "sqlite":
            return  # one writer at a time: there is no such row
        dependant = self._dependant(engine, project, job)
        with transaction(engine) as session:
            assert life.lock(session, dependant.id)
            move(engine, job, Status.CANCELLED)
        assert look(engine, dependant).status == "waiting"
        assert look(engine, job).status == "cancelled"


class TestInternalJobs:
    @pytest.mark.parametrize(
        ("way", "failure", "code"),
        [
            ((Status.CANCELLED,), None, "cancelled"),
            ((*RUN, Status.FAILED), FAILURE, "invalid_data"),
        ],
    )
    def test_what_they_were_making_fails_with_them(
        self, engine: Engine, project: tables.Project, way: tuple[Status, ...], failure: Failure | None, code: str
    ) -> None:
        with transaction(engine) as session:
            job = make_job(session, project, internal=True, kind="internal", recipe="ingest")
            dataset = make_dataset(session, project, ready=False, job_id=job.id)
            model = make_model(session, project, status="processing", job_id=job.id)
        move(engine, job, *way, failure=failure)
        with transaction(engine) as session:
            for made in (session.get_one(tables.Dataset, dataset.id), session.get_one(tables.Model, model.id)):
                assert made.status == "failed"
                assert made.error is not None
                assert made.error["code"] == code

    def test_what_is_ready_stays_ready(self, engine: Engine, project: tables.Project) -> None:
        with transaction(engine) as session:
            job = make_job(session, project, internal=True, kind="internal", recipe="ingest")
            dataset = make_dataset(session, project, ready=True, job_id=job.id)
        move(engine, job, *RUN, Status.SUCCEEDED)
        with transaction(engine) as session:
            assert session.get_one(tables.Dataset, dataset.id).status == "ready"


def test_the_log_is_read_in_pages(engine: Engine, job: tables.Job) -> None:
    def write(session: Session, fresh: tables.Job) -> None:
        for number in range(2, 8):
            assert events.append(session, fresh, type="log", code="x", message="x").number == number
            assert fresh.last_event == number

    act(engine, job, write)
    with transaction(engine, read_only=True) as session:
        assert [event.number for event in events.after(session, job.id, 2, 3)] == [3, 4, 5]
        assert [event.number for event in events.after(session, job.id, 6, 3)] == [7]
        assert list(events.after(session, job.id, 7, 3)) == []
