"""Which job a worker takes next, and the attempt that this begins."""

from typing import Literal

from sqlalchemy import ColumnElement, and_, exists, or_, select, true
from sqlalchemy.orm import Session, aliased

from app.domain.jobs import MEASURE, Actor, Status
from app.store import life, tables
from app.store.attempts import Held
from app.store.clock import Now

RESERVE_SECONDS = 300.0


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

    `devices` holds "cpu", "cuda" or both; "auto" takes GPUs where the worker has any. An internal job runs anywhere, in
    the worker's slot for them; but one that measures a job runs where that job could, on its GPUs if there are any.
    A job that needs more GPUs than are free, but no more than the `gpus` of this host, reserves the host once it has
    waited for RESERVE_SECONDS: smaller ones of no higher priority are left in the queue, so that it is not starved.
    Any number of workers may claim at once, and each gets another job.
    """
    job = session.scalar(
        select(tables.Job)
        .where(
            tables.Job.status == Status.QUEUED,
            tables.Job.not_before <= Now(),
            _sits_beside(devices) if internal else _trains(devices, gpus_free, gpus),
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


def _sits_beside(devices: frozenset[str]) -> ColumnElement[bool]:
    """Say what takes the slot for internal jobs, which has no GPU: of those that measure, what needs none here."""
    measurable = tables.Job.device == "cpu" if "cuda" in devices else _fits(devices, 0)
    return and_(tables.Job.internal.is_(True), or_(tables.Job.recipe != MEASURE, measurable))


def _trains(devices: frozenset[str], gpus_free: int, gpus: int) -> ColumnElement[bool]:
    """Say what takes a training slot: jobs that train and, where there are GPUs, those that measure one on a GPU."""
    wanted = tables.Job.internal.is_(False)
    if "cuda" in devices:
        wanted = or_(wanted, and_(tables.Job.recipe == MEASURE, tables.Job.device != "cpu"))
    return and_(wanted, _fits(devices, gpus_free), _not_reserved(gpus_free, gpus))


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
        big.status == Status.QUEUED, or_(big.internal.is_(False), big.recipe == MEASURE),
        big.device.in_(("auto", "cuda")), big.gpus > gpus_free, big.gpus <= gpus,
        big.created_at < Now() - RESERVE_SECONDS, big.priority >= tables.Job.priority,
    )  # fmt: skip
    return or_(tables.Job.device == "cpu", ~reserving)
