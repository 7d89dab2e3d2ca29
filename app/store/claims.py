"""The worker's half of a job's life: claim, heartbeat, report, end. Every write is fenced by the attempt's number.

A `Held` is the token. Each function that takes one locks the job's row and looks whether that attempt still holds it;
if not, it raises `Fenced` and nothing of that run is written any more. An attempt whose lease ran out but which nobody
has taken over yet may go on: the number decides, not the clock.

The end of a run that made a model is one transaction:

    with transaction(engine) as session:
        model_id = models.publish(session, …) if claims.may_publish(session, held) else None
        claims.finish(session, held, Status.SUCCEEDED, model_id=model_id, …)

`may_publish` takes the lock on the row, so a cancel is either accepted before it, and wins, or comes after the commit,
and finds a finished job.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, true, update
from sqlalchemy.orm import Session, aliased

from app.domain.errors import Failure
from app.domain.jobs import HELD, Actor, Move, Status, Wanted, on_failure, on_finish, on_release
from app.store import checkpoints, children, events, life, metrics, tables
from app.store.clock import Now

RESERVE_SECONDS = 300.0


@dataclass(frozen=True)
class Held:
    """The right of one attempt to write about one job."""

    job_id: str
    project_id: str
    attempt: int
    worker: str


class Fenced(Exception):
    """This attempt no longer holds the job, so nothing of its run may be written; end the run."""


def claim(
    session: Session,
    *,
    worker: str,
    source: Literal["message", "poll"],
    internal: bool,
    devices: frozenset[str],
    gpus_free: int,
    gpus: int = 0,
    lease_seconds: float,
) -> tuple[Held, tables.Job] | None:
    """Take the best job that this worker can run now: by priority, then by age. None if there is none.

    `devices` holds "cpu", "cuda" or both. An internal job runs anywhere; "auto" takes GPUs where the worker has any.
    A job that needs more GPUs than are free, but no more than the `gpus` of this host, reserves the host once it has
    waited for RESERVE_SECONDS: smaller ones of no higher priority are left in the queue, so that it is not starved.
    Any number of workers may claim at once, and each gets another job.
    """
    job = session.scalar(
        select(tables.Job)
        .where(
            tables.Job.status == Status.QUEUED,
            tables.Job.internal.is_(internal),
            tables.Job.not_before <= Now(),
            true() if internal else _fits(devices, gpus_free),
            true() if internal else _not_reserved(gpus_free, gpus),
        )
        .order_by(tables.Job.priority.desc(), tables.Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    if job is None:
        return None
    lease = life.Lease(worker=worker, seconds=lease_seconds, source=source)
    life.move(session, job, Status.STARTING, actor=Actor.CLAIM, lease=lease)
    session.flush()
    return Held(job_id=job.id, project_id=job.project_id, attempt=job.attempt, worker=worker), job


def _fits(devices: frozenset[str], gpus_free: int) -> ColumnElement[bool]:
    on_cpu = tables.Job.device == "cpu" if "cpu" in devices else ~true()
    if "cuda" in devices:
        return or_(on_cpu, and_(tables.Job.device.in_(("auto", "cuda")), tables.Job.gpus <= gpus_free))
    # More than one GPU was asked for on purpose: such a job is never quietly run on a CPU.
    return or_(on_cpu, and_(tables.Job.device == "auto", tables.Job.gpus <= 1))


def _not_reserved(gpus_free: int, gpus: int) -> ColumnElement[bool]:
    if gpus <= gpus_free:
        return true()  # whatever fits this host at all fits it now
    big = aliased(tables.Job)
    reserving = exists().where(
        big.status == Status.QUEUED, big.internal.is_(False), big.device.in_(("auto", "cuda")), big.gpus > gpus_free,
        big.gpus <= gpus, big.created_at < Now() - RESERVE_SECONDS, big.priority >= tables.Job.priority,
    )  # fmt: skip
    return or_(tables.Job.device == "cpu", ~reserving)


def heartbeat(session: Session, held: Held, *, lease_seconds: float, progress: tables.Json | None = None) -> Wanted:
    """Extend the lease, store how far the run is, and say what the user wants.

    Raises:
        Fenced
    """
    values: dict[str, Any] = {"lease_expires_at": Now() + lease_seconds}
    if progress is not None:
        values["progress"] = progress | {"updated_at": session.scalar(select(Now()))}
    wanted = session.scalar(
        update(tables.Job)
        .where(_holds(held))
        .values(**values)
        .returning(tables.Job.wanted)
        .execution_options(synchronize_session=False)
    )
    if wanted is None:
        raise _fenced(held)
    return Wanted(wanted)


def begin(
    session: Session,
    held: Held,
    *,
    plan: tables.Json,
    fingerprint: tables.Json,
    exact: bool = True,
    from_step: int | None = None,
) -> None:
    """Commit the plan before step 0; the job is `running` from now on.

    The first attempt's plan stays for all later ones. Only a run that is already running may put another in its place,
    as after out of memory. `from_step` is the step of the checkpoint that the run starts from (0 for none): what an
    earlier attempt reported beyond it is forgotten. A run that is not `exact` says so in an event.

    Raises:
        Fenced
    """
    job = _hold(session, held)
    if job.plan is None:
        job.plan = plan
    elif job.status == Status.RUNNING and job.plan != plan:
        job.plan = plan
        events.append(
            session, job, type="log", code="plan.changed", level="warning", data={"plan": plan},
            message="The run goes on under another plan.",
        )  # fmt: skip
    if not exact:
        job.exact = False
        events.append(
            session, job, type="log", code="resume.inexact", level="warning", data={"fingerprint": fingerprint},
            message="This worker differs from the one that began: the run goes on, but not with the same bits.",
        )  # fmt: skip
    if from_step is not None:
        metrics.forget_after(session, job.id, from_step)
    session.execute(
        update(tables.Attempt)
        .where(tables.Attempt.job_id == held.job_id, tables.Attempt.attempt == held.attempt)
        .values(fingerprint=fingerprint)
    )
    if job.status == Status.STARTING:
        life.move(session, job, Status.RUNNING, actor=Actor.WORKER)


def first_fingerprint(session: Session, job_id: str) -> tables.Json | None:
    """Give the fingerprint under which the plan was made, to compare a later attempt's with."""
    return session.scalar(
        select(tables.Attempt.fingerprint)
        .where(tables.Attempt.job_id == job_id, tables.Attempt.fingerprint.is_not(None))
        .order_by(tables.Attempt.attempt)
        .limit(1)
    )


def write_metrics(session: Session, held: Held, rows: Sequence[metrics.Row]) -> None:
    """Write a flush of numbers: the rows, the job's latest values, and one event.

    Raises:
        Fenced
    """
    job = _hold(session, held)
    latest = metrics.write(session, job, rows, held.attempt)
    if not latest:
        return
    job.metrics = {**job.metrics, **{name: value for name, (_, value) in latest.items()}}
    newest = max(step for step, _ in latest.values())
    events.append(
        session, job, type="metric", code="metrics", message=f"Metrics up to step {newest}.",
        data={"metrics": {name: list(point) for name, point in latest.items()}},
    )  # fmt: skip


def write_event(
    session: Session,
    held: Held,
    *,
    code: str,
    message: str,
    level: events.Level = "info",
    data: tables.Json | None = None,
) -> None:
    """Write one line to the job's log.

    Raises:
        Fenced
    """
    events.append(session, _hold(session, held), type="log", code=code, message=message, level=level, data=data)


def write_checkpoint(
    session: Session,
    held: Held,
    *,
    step: int,
    epoch: int,
    metrics: tables.Json,
    best: bool,
    bytes: int,
    sha256: str,
) -> tables.Checkpoint:
    """List a checkpoint whose bytes are stored and verified; losses count anew from here, and old ones are dropped.

    Raises:
        Fenced
    """
    job = _hold(session, held)
    checkpoint = checkpoints.insert(
        session, job, step=step, epoch=epoch, metrics=metrics, best=best, bytes=bytes, sha256=sha256
    )
    checkpoints.prune(session, job.id)
    job.losses = 0
    events.append(
        session, job, type="checkpoint", code="checkpoint", message=f"Checkpoint at step {step}.",
        data={"id": checkpoint.id, "step": step, "epoch": epoch, "bytes": bytes, "best": best},
    )  # fmt: skip
    return checkpoint


def may_publish(session: Session, held: Held) -> bool:
    """Lock the job until the commit, and say whether its run may still publish what it made.

    Raises:
        Fenced
    """
    return _hold(session, held).wanted != Wanted.CANCEL


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
    job = _hold(session, held)
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
    job = _hold(session, held)
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
    job = _hold(session, held)
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
    job = _hold(session, held)
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


def _holds(held: Held) -> ColumnElement[bool]:
    return and_(
        tables.Job.id == held.job_id, tables.Job.attempt == held.attempt, tables.Job.lease_owner == held.worker,
        tables.Job.status.in_(HELD),
    )  # fmt: skip


def _hold(session: Session, held: Held) -> tables.Job:
    job = session.scalar(
        select(tables.Job).where(_holds(held)).with_for_update().execution_options(populate_existing=True)
    )
    if job is None:
        raise _fenced(held)
    return job


def _fenced(held: Held) -> Fenced:
    return Fenced(f"attempt {held.attempt} of {held.job_id} is no longer held by {held.worker}")
