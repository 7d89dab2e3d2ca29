"""A job in the hands of a worker, as far as the store sees it: taken, begun, reported about, lost."""

from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.domain.jobs import Actor, Status, Wanted
from app.store import attempts, events, life, tables
from app.store.attempts import Held
from app.store.blobs import Stored
from app.store.session import transaction


def take(session: Session, job: tables.Job, *, seconds: float = 30) -> Held:
    """Claim this very job: the queue of a shared test database is everybody's."""
    life.move(session, job, Status.STARTING, actor=Actor.CLAIM, lease=life.Lease("worker", seconds, "poll"))
    return Held(job.id, job.project_id, job.attempt, "worker")


def read(session: Session, job: tables.Job | Held) -> tables.Job:
    """Read a job as it is now, and lock it."""
    found = life.lock(session, job.id if isinstance(job, tables.Job) else job.job_id)
    assert found is not None
    return found


def look(engine: Engine, job: tables.Job | Held) -> tables.Job:
    """Read a job as it is now."""
    with transaction(engine) as session:
        return read(session, job)


def attempts_of(engine: Engine, held: Held) -> list[tables.Attempt]:
    """Give the attempts of a job, in order."""
    with transaction(engine) as session:
        query = select(tables.Attempt).where(tables.Attempt.job_id == held.job_id).order_by(tables.Attempt.attempt)
        return list(session.scalars(query))


def codes(engine: Engine, held: Held) -> list[str]:
    """Give the codes of what the job's log says."""
    with transaction(engine) as session:
        return [event.code for event in events.after(session, held.job_id, 0, 1000)]


def want(engine: Engine, held: Held, wanted: Wanted) -> None:
    """Say what the user wants."""
    with transaction(engine) as session:
        read(session, held).wanted = wanted


def expire(engine: Engine, held: Held) -> None:
    """Let the lease be over."""
    with transaction(engine) as session:
        read(session, held).lease_expires_at = 1.0


def begin(engine: Engine, held: Held, **more: Any) -> None:
    """Begin the run."""
    with transaction(engine) as session:
        attempts.begin(session, held, **({"plan": {"threads": 1}, "fingerprint": {"torch": "2"}} | more))


def save(engine: Engine, held: Held, blob: Stored, step: int, *, best_step: int | None = None) -> None:
    """List a checkpoint."""
    with transaction(engine) as session:
        attempts.write_checkpoint(
            session, held, step=step, epoch=1, metrics={}, best_step=best_step, bytes=blob.bytes, sha256=blob.sha256
        )
