"""The resumable states of jobs: the newest two and the best are kept, the others' bytes go with the blob sweep."""

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.domain.errors import NotFound
from app.store import tables
from app.store.ids import new_id

KEEP = 2
# Not by id, which holds the time: a clock may be set back, and hosts differ. Attempts only grow, and steps within one.
_NEWEST = (tables.Checkpoint.attempt.desc(), tables.Checkpoint.step.desc())


def of_job(session: Session, job_id: str) -> Sequence[tables.Checkpoint]:
    """Give the checkpoints of a job, newest first."""
    return session.scalars(select(tables.Checkpoint).where(tables.Checkpoint.job_id == job_id).order_by(*_NEWEST)).all()


def find(session: Session, job_id: str, checkpoint_id: str) -> tables.Checkpoint:
    """Give one checkpoint of a job.

    Raises:
        NotFound: the job has none of this id, or it was dropped for newer ones.
    """
    found = session.get(tables.Checkpoint, checkpoint_id)
    if found is None or found.job_id != job_id:
        raise NotFound("This job keeps no such checkpoint; GET …/checkpoints lists them.", code="no_such_checkpoint")
    return found


def exist(session: Session, job: tables.Job) -> bool:
    """Say whether there is anything to go on from: a checkpoint of its own, or the one that a retry was given."""
    own = select(tables.Checkpoint.id).where(tables.Checkpoint.job_id == job.id).limit(1)
    return job.resume_from is not None or session.scalar(own) is not None


def to_resume(session: Session, job: tables.Job) -> Sequence[tables.Checkpoint]:
    """Give the checkpoints that an attempt may start from, best choice first: its own, then the one it was given."""
    own = of_job(session, job.id)
    given = session.get(tables.Checkpoint, job.resume_from) if job.resume_from else None
    return [*own, given] if given is not None else own


def insert(
    session: Session,
    job: tables.Job,
    *,
    step: int,
    epoch: int,
    metrics: tables.Json,
    best_step: int | None,
    bytes: int,
    sha256: str,
) -> tables.Checkpoint:
    """Insert a checkpoint of the job's present attempt; one of the same step and attempt gives way to it.

    None but that of `best_step` is the best from here on; what was best stays so where nobody knows (None).
    """
    session.execute(
        delete(tables.Checkpoint).where(
            tables.Checkpoint.job_id == job.id,
            tables.Checkpoint.step == step,
            tables.Checkpoint.attempt == job.attempt,
        )
    )
    if best_step is not None:
        others = update(tables.Checkpoint).where(
            tables.Checkpoint.job_id == job.id, tables.Checkpoint.step != best_step
        )
        session.execute(others.values(best=False))
    checkpoint = tables.Checkpoint(
        id=new_id("ckpt"), job_id=job.id, attempt=job.attempt, step=step, epoch=epoch, metrics=metrics,
        best=step == best_step, bytes=bytes, sha256=sha256,
    )  # fmt: skip
    session.add(checkpoint)
    session.flush()
    return checkpoint


def prune(session: Session, job_id: str, keep: int = KEEP) -> None:
    """Drop all but the newest `keep` and the best."""
    newest = select(tables.Checkpoint.id).where(tables.Checkpoint.job_id == job_id)
    session.execute(
        delete(tables.Checkpoint).where(
            tables.Checkpoint.job_id == job_id,
            tables.Checkpoint.best.is_(False),
            tables.Checkpoint.id.not_in(newest.order_by(*_NEWEST).limit(keep)),
        )
    )


def discard(session: Session, checkpoint_id: str) -> None:
    """Drop one whose bytes turned out to be damaged, so that nobody tries it again."""
    session.execute(delete(tables.Checkpoint).where(tables.Checkpoint.id == checkpoint_id))
