"""Counts over all projects, for the operator."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.store import tables


def jobs(session: Session) -> dict[str, int]:
    """Count the jobs by status."""
    rows = session.execute(
        select(tables.Job.status, func.count()).where(tables.Job.deleted_at.is_(None)).group_by(tables.Job.status)
    )
    return {row[0]: row[1] for row in rows}


def claims(session: Session) -> dict[str, int]:
    """Count the claims ever made, by how the worker found the job."""
    rows = session.execute(select(tables.Attempt.source, func.count()).group_by(tables.Attempt.source))
    return {row[0]: row[1] for row in rows}
