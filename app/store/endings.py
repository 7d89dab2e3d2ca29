"""How an attempt ends: well, badly, handed back, or waiting for children; fenced as everything its worker writes.

The end of a run that made a model is one transaction:

    with transaction(engine) as session:
        model_id = models.publish(session, …) if endings.may_publish(session, held) else None
        endings.finish(session, held, Status.SUCCEEDED, model_id=model_id, …)

`may_publish` takes the lock on the row, so a cancel is either accepted before it, and wins, or comes after the commit,
and finds a finished job.
"""

from collections.abc import Iterable, Mapping

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.domain.errors import Failure
from app.domain.jobs import Actor, Move, Status, Wanted, on_failure, on_finish, on_release
from app.store import checkpoints, children, life, tables
from app.store.attempts import Held, hold


def may_publish(session: Session, held: Held) -> bool:
    """Lock the job until the commit, and say whether its run may still publish what it made.

    Raises:
        Fenced
    """
    return hold(session, held).wanted != Wanted.CANCEL


def finish(
    session: Session,
    held: Held,
    status: Status,
    *,
    result: tables.Json | None = None,
    metrics: Mapping[str, float | None] | None = None,
    best: tables.Json | None = None,
    files: Iterable[tuple[str, str, int, str]] = (),
    model_id: str | None = None,
    reason: str | None = None,
) -> Status:
    """End a run that did not fail, and give the status that the job really gets: a cancel wins over everything.

    `files` are `(name, media type, bytes, sha256)`, stored and verified. A cancelled job keeps nothing but its
    checkpoints; a paused one nothing but them and its numbers.

    Raises:
        Fenced
        ValueError: a model was published although the job is cancelled; `may_publish` says so beforehand.
    """
    job = hold(session, held)
    decision = on_finish(status, Wanted(job.wanted))
    if decision.status is Status.CANCELLED and model_id is not None:
        raise ValueError(f"job {job.id} is cancelled and publishes no model: ask may_publish first")
    if decision.status in (Status.SUCCEEDED, Status.STOPPED):
        job.result, job.model_id = result, model_id
        for name, media_type, size, sha256 in files:
            session.add(tables.JobFile(job_id=job.id, name=name, media_type=media_type, bytes=size, sha256=sha256))
    if decision.status is not Status.CANCELLED:
        job.metrics = {**job.metrics, **(metrics or {})}
        job.best = best or job.best
    return _decided(session, job, decision, reason=reason)


def give_up(session: Session, held: Held, failure: Failure) -> Status:
    """End a run that failed: another attempt after a while, or the end of the job.

    Raises:
        Fenced
    """
    job = hold(session, held)
    decision = on_failure(
        failure, Wanted(job.wanted), losses=job.losses, attempts=spent(session, job), max_attempts=job.max_attempts,
        has_checkpoint=checkpoints.exist(session, job),
    )  # fmt: skip
    return _decided(session, job, decision)


def release(session: Session, held: Held, reason: str = "drained") -> Status:
    """Hand a job back that this worker cannot go on with because it is leaving; nothing is counted against the job.

    Raises:
        Fenced
    """
    job = hold(session, held)
    decision = on_release(Wanted(job.wanted), has_checkpoint=checkpoints.exist(session, job))
    return _decided(session, job, decision, reason=reason if decision.status is Status.QUEUED else None)


def insert_children(session: Session, held: Held, specs: Iterable[tables.Json]) -> Status:
    """Insert the next round of an orchestrating job, which waits for it without holding a slot.

    Each spec is a job's body with a `child_key` beside it; a child whose key the parent already has is not made twice.
    A round is as good as a checkpoint: losses count anew from here.

    Raises:
        Fenced
        UserFault: a spec has no key, or the API would refuse it; no child is inserted then.
    """
    job = hold(session, held)
    decision = on_finish(Status.WAITING, Wanted(job.wanted))
    if decision.status is Status.WAITING:
        known = children.known_keys(session, job)
        for spec in specs:
            if spec.get("child_key") in known:
                continue
            child = children.make(session, job, spec)
            known.add(child.child_key)
            life.insert(session, child)
        job.losses = 0
    return _decided(session, job, decision, reason="children" if decision.status is Status.WAITING else None)


def spent(session: Session, job: tables.Job) -> int:
    """Count the attempts that `max_attempts` limits: those lost or failed, and the present one."""
    ended_badly = session.scalar(
        select(func.count())
        .select_from(tables.Attempt)
        .where(tables.Attempt.job_id == job.id, tables.Attempt.outcome.in_(("lost", "failed")))
    )
    return (ended_badly or 0) + 1


def _decided(session: Session, job: tables.Job, decision: Move, *, reason: str | None = None) -> Status:
    assert decision.status is not None, "a decision about a job that nobody holds any more names a status"
    life.move(
        session, job, decision.status, actor=Actor.WORKER, reason=decision.reason or reason, failure=decision.failure,
        delay_seconds=decision.delay_seconds, wanted=decision.wanted, counts_as_loss=decision.counts_as_loss,
    )  # fmt: skip
    return decision.status
