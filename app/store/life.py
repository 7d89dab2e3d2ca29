"""The only way a job comes to life or changes its status: one compare-and-set with everything that belongs to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Select, and_, exists, not_, select, update
from sqlalchemy.orm import Session, aliased
from sqlalchemy.orm.attributes import set_committed_value

from app.domain.errors import Conflict, Failure
from app.domain.jobs import HELD, TERMINAL, Actor, Status, Wanted, on_parent, permitted
from app.store import events, tables
from app.store.clock import Now


@dataclass(frozen=True)
class Lease:
    """What a claim brings: who holds the job, for how long, and how the job was found."""

    worker: str
    seconds: float
    source: str  # "message" or "poll"


@dataclass(frozen=True)
class _Step:
    """One step of a job's life, and what is to be written with it."""

    after: Status
    actor: Actor
    reason: str | None = None
    failure: Failure | None = None
    delay_seconds: float = 0
    wanted: Wanted | None = None
    counts_as_loss: bool = False
    lease: Lease | None = None


def lock(session: Session, job_id: str) -> tables.Job | None:
    """Read a job as it is now and keep its row locked until the commit; whoever decides about a job does this first."""
    return session.scalar(
        select(tables.Job).where(tables.Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    )


def insert(session: Session, job: tables.Job) -> None:
    """Insert a job that is `queued` or `waiting`, with its first event; a queued one is noted for a wake-up."""
    if not permitted(None, Status(job.status), Actor.API):
        raise Conflict(f"A job cannot begin as {job.status}.", code="illegal_transition", status=job.status)
    session.add(job)
    session.flush()
    events.append(
        session, job, type="status", code=job.status, message=f"The job is {job.status}.", data={"status": job.status}
    )
    if job.status == Status.QUEUED:
        _wake(session, job)


def move(
    session: Session,
    job: tables.Job,
    after: Status,
    *,
    actor: Actor,
    reason: str | None = None,
    failure: Failure | None = None,
    delay_seconds: float = 0,
    wanted: Wanted | None = None,
    counts_as_loss: bool = False,
    lease: Lease | None = None,
) -> None:
    """Move a job from the status that `job` shows to `after`, with everything that follows from it.

    Writes status, reason, error, times, back-off and losses; takes or clears the lease and opens or closes the attempt;
    appends the `status` event and, at the end of the job's life, its one `done` event; frees or fails the jobs that
    wait for this one and the dataset or model that it was making. Jobs that can be claimed at once are noted in
    `session.info["wake"]` as `(job_id, internal)`, to be announced after the commit.

    Raises:
        Conflict: the actor may not make this move, or the row is no longer as `job` shows it.
    """
    _apply(session, job, _Step(after, actor, reason, failure, delay_seconds, wanted, counts_as_loss, lease))
    if after in TERMINAL:
        free_those_who_wait(session, job)


def free_those_who_wait(session: Session, job: tables.Job) -> None:
    """Let the jobs go on that wait for this terminal one: those that start from its model, and its parent.

    Rows that another transaction holds are left to the sweep: waiting for them here could deadlock, because a verb on a
    parent locks the parent first and its children next.
    """
    ended = [job]  # a list and no recursion: a chain of jobs may be longer than Python's stack
    while ended:
        job = ended.pop()
        decision = on_parent(Status(job.status), made_model=job.model_id is not None)
        assert decision.status is not None
        for dependant in _dependants(session, job):
            if decision.status is Status.QUEUED:
                dependant.base_model_id = job.model_id
            _apply(session, dependant, _Step(decision.status, Actor.SWEEP, decision.reason, decision.failure))
            if decision.status in TERMINAL:
                ended.append(dependant)
        if job.parent_id is not None:
            go_on_after_children(session, parent_id=job.parent_id)


def go_on_after_children(session: Session, *, parent_id: str | None = None, limit: int = 100) -> None:
    """Queue the orchestrating jobs (or this one) whose round of children is over."""
    child = aliased(tables.Job)
    unfinished = exists().where(child.parent_id == tables.Job.id, child.status.not_in(TERMINAL))
    waits_for_a_model = and_(tables.Job.wait_for_job_id.is_not(None), tables.Job.base_model_id.is_(None))
    parents = select(tables.Job).where(tables.Job.status == Status.WAITING, not_(waits_for_a_model), ~unfinished)
    if parent_id is not None:
        parents = parents.where(tables.Job.id == parent_id)
    for parent in _unheld(session, parents.limit(limit)):
        _apply(session, parent, _Step(Status.QUEUED, Actor.SWEEP, "children_finished"))


def waiting_for_a_model() -> ColumnElement[bool]:
    """Give the condition under which a job still waits for another job's model."""
    return and_(tables.Job.status == Status.WAITING, tables.Job.base_model_id.is_(None))


def _dependants(session: Session, job: tables.Job) -> Sequence[tables.Job]:
    return _unheld(session, select(tables.Job).where(tables.Job.wait_for_job_id == job.id, waiting_for_a_model()))


def _unheld(session: Session, jobs: Select[tables.Job]) -> Sequence[tables.Job]:
    return session.scalars(jobs.with_for_update(skip_locked=True).execution_options(populate_existing=True)).all()


def _apply(session: Session, job: tables.Job, step: _Step) -> None:
    """Make one move, without what follows for other jobs."""
    before, after = Status(job.status), step.after
    if not permitted(before, after, step.actor):
        raise Conflict(f"A job that is {before} cannot become {after}.", code="illegal_transition", status=str(before))
    if (step.lease is not None) != (after is Status.STARTING):
        raise ValueError("a lease is taken with the move to `starting`, and only then")
    session.flush()
    _write(session, job, before, step)
    if step.lease is not None:
        session.add(
            tables.Attempt(job_id=job.id, attempt=job.attempt, worker=step.lease.worker, source=step.lease.source)
        )
    elif before in HELD and after not in HELD:
        _close_attempt(session, job, step)
    _tell(session, job, after, failure=step.failure)
    if after is Status.QUEUED and not step.delay_seconds:
        _wake(session, job)
    if after in TERMINAL:
        _fail_what_it_was_making(session, job, after)


def _write(session: Session, job: tables.Job, before: Status, step: _Step) -> None:
    after, failure, lease = step.after, step.failure, step.lease
    values: dict[str, Any] = {"status": after, "status_reason": step.reason}
    if failure is not None and after is Status.FAILED:
        values |= {"error": failure.to_json(), "status_reason": step.reason or failure.code}
    if step.wanted is not None:
        values["wanted"] = step.wanted
    if step.counts_as_loss:
        values["losses"] = tables.Job.losses + 1
    if after is Status.QUEUED:
        values["not_before"] = Now() + step.delay_seconds if step.delay_seconds else 0.0
    if after in TERMINAL:
        values["finished_at"] = Now()
    if lease is not None:
        values |= {
            "attempt": tables.Job.attempt + 1, "lease_owner": lease.worker, "lease_expires_at": Now() + lease.seconds,
        }  # fmt: skip
        if job.started_at is None:
            values["started_at"] = Now()
    elif after not in HELD:
        values |= {"lease_owner": None, "lease_expires_at": None}
    row = session.execute(
        update(tables.Job)
        .where(tables.Job.id == job.id, tables.Job.status == before, tables.Job.attempt == job.attempt)
        .values(**values)
        .returning(*(getattr(tables.Job, name) for name in values))
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        raise Conflict("The job changed at the same moment; ask again.", code="changed_meanwhile", status=str(before))
    for name in values:
        set_committed_value(job, name, getattr(row, name))


def _close_attempt(session: Session, job: tables.Job, step: _Step) -> None:
    if step.actor is Actor.SWEEP:
        outcome = "lost"
    elif step.failure is not None:
        outcome = "failed"
    elif step.after is Status.QUEUED:
        outcome = step.reason or "queued"
    else:
        outcome = str(step.after)
    closed = session.execute(
        update(tables.Attempt)
        .where(
            tables.Attempt.job_id == job.id, tables.Attempt.attempt == job.attempt, tables.Attempt.closed_at.is_(None)
        )
        .values(closed_at=Now(), outcome=outcome[:16], error=step.failure.to_json() if step.failure else None)
        .execution_options(synchronize_session=False)
    )
    assert cast("CursorResult[Any]", closed).rowcount == 1, "a held job has exactly one open attempt"


def _tell(session: Session, job: tables.Job, after: Status, *, failure: Failure | None) -> None:
    data: tables.Json = {"status": str(after), "reason": job.status_reason, "wanted": job.wanted}
    message = f"The job is {after}" + (f" ({job.status_reason})." if job.status_reason else ".")
    level: events.Level = "info"
    if failure is not None:
        data["error"] = failure.to_json()
        message += f" {failure.message}"
        level = "error" if after is Status.FAILED else "warning"
    events.append(session, job, type="status", code=str(after), message=message, level=level, data=data)
    if after in TERMINAL:
        events.append(
            session, job, type="done", code=str(after), message=message, level=level,
            data=data | {"model": job.model_id},
        )  # fmt: skip


def _fail_what_it_was_making(session: Session, job: tables.Job, after: Status) -> None:
    """An ingest or import that ended otherwise than well leaves nothing `processing` for ever."""
    if not job.internal or after is Status.SUCCEEDED:
        return
    error = job.error or {
        "class": "user", "code": str(after), "message": f"The job that was making this ended {after}.",
        "hint": "Send it again.", "phase": None, "retryable": False,
    }  # fmt: skip
    for table in (tables.Dataset, tables.Model):
        session.execute(
            update(table)
            .where(table.job_id == job.id, table.status == "processing")
            .values(status="failed", error=error)
        )


def _wake(session: Session, job: tables.Job) -> None:
    wake: list[tuple[str, bool]] = session.info.setdefault("wake", [])
    if (job.id, job.internal) not in wake:
        wake.append((job.id, job.internal))
