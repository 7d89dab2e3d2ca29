"""What no single worker is responsible for: lost workers, satisfied waits, things that expire. Any worker sweeps."""

from collections.abc import Collection

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from app.domain.jobs import HELD, TERMINAL, Actor, Wanted, on_loss
from app.store import checkpoints, endings, life, tables, workers
from app.store.clock import Now

ANSWERS_KEPT_SECONDS = 24 * 3600.0


def sweep(session: Session, *, limit: int = 100, own: Collection[str] = ()) -> list[tuple[str, bool]]:
    """Do one round; safe in any number of processes at once, each skips what another is at.

    Returns the jobs that can be claimed now, as `(job_id, internal)`, to be announced after the commit.

    Args:
        own: jobs that run in this very process, which are not lost: after the host slept, or its clock was put forward,
            their leases are over before they can be extended.
    """
    recover_lost(session, limit, own)
    settle_waits(session, limit)
    forget_expired(session)
    workers.forget(session)
    return list(session.info.get("wake", []))


def recover_lost(session: Session, limit: int = 100, own: Collection[str] = ()) -> None:
    """Take the jobs back whose worker let its lease run out, but for those of this process's `own`."""
    lost = session.scalars(
        select(tables.Job)
        .where(tables.Job.lease_expires_at < Now(), tables.Job.status.in_(HELD), tables.Job.id.not_in(own))
        .order_by(tables.Job.lease_expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    for job in lost:
        decision = on_loss(
            Wanted(job.wanted), losses=job.losses, attempts=endings.spent(session, job), max_attempts=job.max_attempts,
            has_checkpoint=checkpoints.exist(session, job),
        )  # fmt: skip
        assert decision.status is not None
        life.move(
            session, job, decision.status, actor=Actor.SWEEP, reason=decision.reason, failure=decision.failure,
            counts_as_loss=decision.counts_as_loss,
        )  # fmt: skip


def settle_waits(session: Session, limit: int = 100) -> None:
    """Let the jobs go on whose parent or children ended while nobody could tell them."""
    awaited = select(tables.Job.wait_for_job_id).where(life.waiting_for_a_model())
    ended = session.scalars(
        select(tables.Job).where(tables.Job.status.in_(TERMINAL), tables.Job.id.in_(awaited)).limit(limit)
    ).all()
    for job in ended:
        life.free_those_who_wait(session, job)
    life.go_on_after_children(session, limit=limit)


def forget_expired(session: Session) -> None:
    """Drop stored answers, cookies and uploads whose time is over; the bytes go with the blob sweep."""
    session.execute(delete(tables.Idempotency).where(tables.Idempotency.created_at < Now() - ANSWERS_KEPT_SECONDS))
    session.execute(delete(tables.Session).where(tables.Session.expires_at < Now()))
    used = (
        exists().where(tables.Dataset.upload_id == tables.Upload.id),
        exists().where(tables.Model.upload_id == tables.Upload.id),
    )
    session.execute(delete(tables.Upload).where(tables.Upload.expires_at < Now(), *(~use for use in used)))
