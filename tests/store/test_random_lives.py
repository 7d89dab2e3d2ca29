"""Random lives of several jobs in a real database, against a model of what was promised.

The pure rules are tested in tests/domain/test_life.py; here it is the store that must keep to them: one end, one open
attempt, growing attempts, no stale write, no hole in the log, a lease while held.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, delete, event, select, update

from app.domain.errors import Conflict, Failure
from app.domain.jobs import HELD, TERMINAL, Actor, Status, Verb, Wanted, on_request
from app.store import attempts, checkpoints, claims, endings, events, life, migrate, sweeps, tables
from app.store.session import make_engine, transaction
from tests.factories import make_job, make_project

# A busy machine is no defect of the code.
BUSY = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

pytestmark = pytest.mark.store

ENGINE: dict[str, Engine] = {}


@pytest.fixture(scope="module")
def _engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    url = f"sqlite:///{tmp_path_factory.mktemp('lives') / 'lives.db'}"
    migrate.upgrade(url)
    engine = make_engine(url)
    # What a power cut would do is not the question here.
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    ENGINE["it"] = engine
    yield
    engine.dispose()


class Lives(RuleBasedStateMachine):
    """A queue of a few jobs, two workers, a user and a sweep; each rule is one transaction."""

    tokens: Bundle[attempts.Held] = Bundle("tokens")

    @initialize(waiting=st.booleans())
    def make_jobs(self, waiting: bool) -> None:
        self.engine = ENGINE["it"]
        with transaction(self.engine) as session:
            session.execute(delete(tables.Job))  # with all their lines: the queue is this example's alone
            project = make_project(session)
            first = make_job(session, project, max_attempts=4)
            more = {"status": "waiting", "wait_for_job_id": first.id} if waiting else {}
            second = make_job(session, project, max_attempts=4, **more)
        self.ids = [first.id, second.id]
        self.attempts = dict.fromkeys(self.ids, 0)
        self.ends: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.numbers = dict.fromkeys(self.ids, 0)

    def job(self, session: Any, job_id: str) -> tables.Job:
        job = life.lock(session, job_id)
        assert job is not None
        return job

    def holds(self, held: attempts.Held) -> bool:
        """Say, from the model's side only, whether a token is the present one."""
        with transaction(self.engine, read_only=True) as session:
            job = session.get_one(tables.Job, held.job_id)
            return held.attempt == self.attempts[held.job_id] and job.status in HELD

    @rule(target=tokens, worker=st.sampled_from(["one", "two"]))
    def claim(self, worker: str) -> Any:
        with transaction(self.engine) as session:
            session.execute(update(tables.Job).where(tables.Job.id.in_(self.ids)).values(not_before=0.0))
            found = claims.claim(
                session, worker=worker, source="poll", internal=False, devices=frozenset({"cpu"}), gpus_free=0,
                lease_seconds=1000,
            )  # fmt: skip
        if found is None:
            return attempts.Held("none", "none", 0, worker)
        held, job = found
        assert job.id in self.ids
        assert held.attempt > self.attempts[job.id], "attempts strictly grow"
        assert job.id not in self.ends
        self.attempts[job.id] = held.attempt
        return held

    def write(self, held: attempts.Held, step: Any) -> None:
        """Write under a token; what is accepted and refused must be what the model says."""
        if held.job_id not in self.ids:
            return
        valid = self.holds(held)
        try:
            with transaction(self.engine) as session:
                step(session)
        except attempts.Fenced:
            assert not valid, "the holder was refused"
        else:
            assert valid, "a stale write was accepted"

    @rule(held=tokens)
    def begin(self, held: attempts.Held) -> None:
        self.write(held, lambda session: attempts.begin(session, held, plan={"by": held.attempt}, fingerprint={}))

    @rule(held=tokens)
    def heartbeat(self, held: attempts.Held) -> None:
        self.write(held, lambda session: attempts.heartbeat(session, held, lease_seconds=1000, progress={"step": 1}))

    @rule(held=tokens, step=st.integers(0, 3))
    def metrics(self, held: attempts.Held, step: int) -> None:
        self.write(held, lambda session: attempts.write_metrics(session, held, [("loss", step, float(held.attempt))]))

    @rule(held=tokens)
    def checkpoint(self, held: attempts.Held) -> None:
        def step(session: Any) -> None:
            session.merge(tables.Blob(sha256="c" * 64, bytes=1))
            attempts.write_checkpoint(
                session, held, step=1, epoch=0, metrics={}, best_step=None, bytes=1, sha256="c" * 64
            )

        self.write(held, step)

    @rule(held=consumes(tokens), outcome=st.sampled_from([Status.SUCCEEDED, Status.STOPPED, Status.PAUSED]))
    def finish(self, held: attempts.Held, outcome: Status) -> None:
        def step(session: Any) -> None:
            model = "mdl_x" if endings.may_publish(session, held) and outcome is not Status.PAUSED else None
            endings.finish(session, held, outcome, model_id=model)

        self.write(held, step)

    @rule(held=tokens, retryable=st.booleans())
    def give_up(self, held: attempts.Held, retryable: bool) -> None:
        failure = Failure(fault="system", code="crash", message="It crashed.", retryable=retryable)
        self.write(held, lambda session: endings.give_up(session, held, failure))

    @rule(held=tokens)
    def drain(self, held: attempts.Held) -> None:
        self.write(held, lambda session: endings.release(session, held))

    @rule(number=st.integers(0, 1), verb=st.sampled_from(["cancel", "stop", "pause", "resume"]))
    def user(self, number: int, verb: Verb) -> None:
        job_id = self.ids[number]
        with transaction(self.engine) as session:
            job = self.job(session, job_id)
            before = Status(job.status)
            try:
                decision = on_request(verb, before, Wanted(job.wanted), has_checkpoint=checkpoints.exist(session, job))
            except Conflict:
                return
            if decision.status is not None:
                life.move(
                    session, job, decision.status, actor=Actor.API, reason=decision.reason, wanted=decision.wanted
                )
            elif decision.wanted is not None:
                job.wanted = decision.wanted
        if verb == "cancel" and before not in TERMINAL:
            self.cancelled.add(job_id)

    @rule(number=st.integers(0, 1))
    def lose_a_worker(self, number: int) -> None:
        with transaction(self.engine) as session:
            ours = update(tables.Job).where(tables.Job.id == self.ids[number], tables.Job.status.in_(HELD))
            session.execute(ours.values(lease_expires_at=1.0))

    @rule()
    def sweep(self) -> None:
        with transaction(self.engine) as session:
            sweeps.sweep(session)

    @invariant()
    def promises_are_kept(self) -> None:
        if not hasattr(self, "ids"):
            return
        with transaction(self.engine, read_only=True) as session:
            for job_id in self.ids:
                self.check(session, session.get_one(tables.Job, job_id))

    def check(self, session: Any, job: tables.Job) -> None:
        if job.id in self.ends:
            assert job.status == self.ends[job.id], "terminal absorbs"
        elif job.status in TERMINAL:
            self.ends[job.id] = job.status
        assert (job.lease_expires_at is not None) is (job.status in HELD)
        assert (job.lease_owner is not None) is (job.status in HELD)
        assert job.attempt == self.attempts[job.id]
        log = list(events.after(session, job.id, 0, 10_000))
        assert [event.number for event in log] == list(range(1, len(log) + 1))
        assert job.last_event == len(log) >= self.numbers[job.id]
        self.numbers[job.id] = len(log)
        assert [event.type for event in log].count("done") == (job.status in TERMINAL)
        assert all(earlier.attempt <= later.attempt for earlier, later in itertools.pairwise(log))
        attempts = session.scalars(select(tables.Attempt).where(tables.Attempt.job_id == job.id)).all()
        assert [attempt.attempt for attempt in attempts if attempt.closed_at is None] == (
            [job.attempt] if job.status in HELD else []
        )
        assert sorted(attempt.attempt for attempt in attempts) == list(range(1, job.attempt + 1))
        if job.id in self.cancelled:
            assert job.status in HELD | {Status.CANCELLED}
            assert job.model_id is None
        if job.model_id is not None:
            assert job.status in (Status.SUCCEEDED, Status.STOPPED)
        if job.plan is not None:
            assert job.plan["by"] <= job.attempt
        newest = session.scalars(select(tables.Metric).where(tables.Metric.job_id == job.id)).all()
        assert all(metric.value == metric.attempt <= job.attempt for metric in newest)


@pytest.mark.usefixtures("_engine")
def test_random_lives() -> None:
    run_state_machine_as_test(
        Lives,
        settings=hypothesis_settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=BUSY
        ),
    )


@pytest.mark.long
@pytest.mark.usefixtures("_engine")
def test_many_random_lives() -> None:
    run_state_machine_as_test(
        Lives,
        settings=hypothesis_settings(
            max_examples=500, stateful_step_count=50, deadline=None, suppress_health_check=BUSY
        ),
    )
