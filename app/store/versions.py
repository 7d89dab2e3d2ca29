"""`name` and `version`: a version is never another object's, not even after a delete."""

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.store import tables


def insert(session: Session, row: tables.Dataset | tables.Model, name: str) -> None:
    """Insert a row, or rename it, under the next version of the name; two at once get two versions."""
    while True:
        version = _next(session, row, name)
        try:
            with session.begin_nested():
                row.name, row.version = name, version
                session.add(row)
                session.flush()
        except IntegrityError:
            if _next(session, row, name) == version:
                raise  # something else than the race for a version
        else:
            return


def _next(session: Session, row: tables.Dataset | tables.Model, name: str) -> int:
    table = type(row)
    query = select(func.max(table.version)).where(table.project_id == row.project_id, table.name == name)
    return (session.scalar(query) or 0) + 1
