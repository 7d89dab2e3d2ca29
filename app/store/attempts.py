"""The worker's half of a job's life while it runs: heartbeat and reports, fenced by the attempt's number.

A `Held` is the token. Each function that takes one locks the job's row and looks whether that attempt still holds it;
if not, it raises `Fenced` and nothing of that run is written any more. An attempt whose lease ran out but which nobody
has taken over yet may go on: the number decides, not the clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.orm import Session

from app.domain.jobs import HELD, Actor, Status, Wanted
from app.store import checkpoints, events, life, metrics, tables
from app.store.clock import Now


@dataclass(frozen=True)
class Held:
    """The right of one attempt to write about one job."""

    job_id: str
    project_id: str
    attempt: int
    worker: str


class Fenced(Exception):
    """This attempt no longer holds the job, so nothing of its run may be written; end the run."""


def hold(session: Session, held: Held) -> tables.Job:
    """Read the job as it is now and keep its row locked until the commit.

    Raises:
        Fenced
    """
    job = session.scalar(
        select(tables.Job).where(_holds(held)).with_for_update().execution_options(populate_existing=True)
    )
    if job is None:
        raise _fenced(held)
    return job


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
    earlier attempt reported beyond it is forgotten. A run that is not `exact` makes the job so for good; the trainer's
    own event says what differs.

    Raises:
        Fenced
    """
    job = hold(session, held)
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
    if from_step is not None:
        metrics.forget_after(session, job.id, from_step)
    session.execute(
        update(tables.Attempt)
        .where(tables.Attempt.job_id == held.job_id, tables.Attempt.attempt == held.attempt)
        .values(fingerprint=fingerprint)
    )
    if job.status == Status.STARTING:
        life.move(session, job, Status.RUNNING, actor=Actor.WORKER)


def write_metrics(session: Session, held: Held, rows: Sequence[metrics.Row]) -> None:
    """Write a flush of numbers: the rows, the job's latest values, and one event.

    Raises:
        Fenced
    """
    job = hold(session, held)
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
    events.append(session, hold(session, held), type="log", code=code, message=message, level=level, data=data)


def write_checkpoint(
    session: Session,
    held: Held,
    *,
    step: int,
    epoch: int,
    metrics: tables.Json,
    best_step: int | None,
    bytes: int,
    sha256: str,
) -> tables.Checkpoint:
    """List a checkpoint whose bytes are stored and verified; losses count anew from here, and old ones are dropped.

    Raises:
        Fenced
    """
    job = hold(session, held)
    checkpoint = checkpoints.insert(
        session, job, step=step, epoch=epoch, metrics=metrics, best_step=best_step, bytes=bytes, sha256=sha256
    )
    checkpoints.prune(session, job.id)
    job.losses = 0
    events.append(
        session, job, type="checkpoint", code="checkpoint", message=f"Checkpoint at step {step}.",
        data={"id": checkpoint.id, "step": step, "epoch": epoch, "bytes": bytes, "best": checkpoint.best},
    )  # fmt: skip
    return checkpoint


def _holds(held: Held) -> ColumnElement[bool]:
    return and_(
        tables.Job.id == held.job_id, tables.Job.attempt == held.attempt, tables.Job.lease_owner == held.worker,
        tables.Job.status.in_(HELD),
    )  # fmt: skip


def _fenced(held: Held) -> Fenced:
    return Fenced(f"attempt {held.attempt} of {held.job_id} is no longer held by {held.worker}")
