"""The jobs that an orchestrating job makes: checked as if they had been POSTed, and told of when they have ended."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain.errors import ApiError, UserFault
from app.domain.jobs import TERMINAL
from app.store import submit, tables


def make(session: Session, parent: tables.Job, body: tables.Json) -> tables.Job:
    """Turn the body of a child into a row that can be inserted; project, priority and attempts are the parent's.

    Raises:
        UserFault: it has no key, or the API would refuse the same body; the message names the child and the field.
    """
    key = body.get("child_key")
    if not isinstance(key, str) or not key:
        raise UserFault("Each spec of a child needs a `child_key` that is its own.", phase="plan")
    given = {name: value for name, value in body.items() if name != "child_key"}
    given |= {"name": given.get("name") or f"{parent.name} {key}"[:200], "priority": parent.priority}
    try:
        child = submit.prepare(session, parent.project_id, given).job(
            parent.project_id, max_attempts=parent.max_attempts
        )
    except ApiError as refused:
        raise UserFault(f"Child {key!r}: {refused.message}", code=refused.code, phase="plan") from refused
    child.parent_id, child.child_key = parent.id, key
    return child


def known_keys(session: Session, parent: tables.Job) -> set[str | None]:
    """Give the keys of all children that a job has, whatever became of them."""
    return set(session.scalars(select(tables.Job.child_key).where(tables.Job.parent_id == parent.id)))


def ended(session: Session, parent: tables.Job) -> tuple[tables.Json, ...]:
    """Tell of the children that ended, in the order in which they were made."""
    rows = session.scalars(
        select(tables.Job)
        .where(tables.Job.parent_id == parent.id, tables.Job.status.in_(TERMINAL))
        .order_by(tables.Job.id)
    )
    return tuple(
        {
            "key": child.child_key, "job": child.id, "status": child.status, "spec": child.spec, "best": child.best,
            "result": child.result, "metrics": child.metrics, "model": child.model_id, "error": child.error,
        }
        for child in rows
    )  # fmt: skip


def model_of_one(session: Session, parent: tables.Job, model_id: str) -> str | None:
    """Give the id back if it is a model that a child of this job made and that is still there; else None."""
    return session.scalar(
        select(tables.Model.id)
        .join(tables.Job, tables.Job.id == tables.Model.job_id)
        .where(tables.Model.id == model_id, tables.Job.parent_id == parent.id, tables.Model.deleted_at.is_(None))
    )
