"""The log of a job: numbered lines without holes. Polling, streaming and webhooks all read this one log."""

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from app.store import tables
from app.store.ids import new_id

EventType = Literal["status", "metric", "checkpoint", "log", "done"]
Level = Literal["info", "warning", "error"]


def append(
    session: Session,
    job: tables.Job,
    *,
    type: EventType,
    code: str,
    message: str,
    level: Level = "info",
    data: tables.Json | None = None,
) -> tables.Event:
    """Write the next line of a job's log.

    The number is drawn by an UPDATE of the job's row, whose lock is kept until the commit: two writers can neither
    take the same number nor leave a hole, and a reader that saw number n never meets a smaller one later.
    """
    number = session.execute(
        update(tables.Job)
        .where(tables.Job.id == job.id)
        .values(last_event=tables.Job.last_event + 1)
        .returning(tables.Job.last_event)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    set_committed_value(job, "last_event", number)
    event = tables.Event(
        id=new_id("evt"), job_id=job.id, number=number, type=type, code=code, level=level, message=message,
        data=data or {}, attempt=job.attempt,
    )  # fmt: skip
    session.add(event)
    return event


def after(session: Session, job_id: str, number: int, limit: int) -> Sequence[tables.Event]:
    """Give at most `limit` lines that follow line `number`, in order."""
    return session.scalars(
        select(tables.Event)
        .where(tables.Event.job_id == job_id, tables.Event.number > number)
        .order_by(tables.Event.number)
        .limit(limit)
    ).all()
