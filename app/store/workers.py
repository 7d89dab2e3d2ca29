"""The workers: what they are, what they offer, and when they were last heard."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.store import tables
from app.store.clock import Now

FORGOTTEN_SECONDS = 24 * 3600.0


def beat(
    session: Session,
    worker: str,
    *,
    host: str,
    slots: int,
    busy: int,
    gpus: list[Any],
    versions: tables.Json,
    draining: bool,
) -> None:
    """Say that a worker lives, with what it offers now."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    offer: dict[str, Any] = {
        "host": host, "slots": slots, "busy": busy, "gpus": gpus, "versions": versions, "draining": draining,
        "heartbeat_at": Now(),
    }  # fmt: skip
    session.execute(
        insert(tables.Worker).values(id=worker, **offer).on_conflict_do_update(index_elements=["id"], set_=offer)
    )


def every(session: Session) -> Sequence[tuple[tables.Worker, float]]:
    """Give all workers with the age of their heartbeat in seconds, by id."""
    rows = session.execute(select(tables.Worker, Now() - tables.Worker.heartbeat_at).order_by(tables.Worker.id))
    return [(worker, age) for worker, age in rows]


def leave(session: Session, worker: str) -> None:
    """Take a worker off the list that ended by itself."""
    session.execute(delete(tables.Worker).where(tables.Worker.id == worker))


def forget(session: Session) -> None:
    """Take the workers off the list that nobody has heard for a day."""
    session.execute(delete(tables.Worker).where(tables.Worker.heartbeat_at < Now() - FORGOTTEN_SECONDS))
