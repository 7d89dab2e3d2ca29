"""The wall between projects: a row is found only by its id and its project together."""

from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain.errors import NotFound
from app.store import tables

Owned = TypeVar("Owned", tables.Dataset, tables.Job, tables.Model)


def find(session: Session, table: type[Owned], id: str, project_id: str, *, lock: bool = False) -> Owned:
    """Find a living row of this project.

    With `lock` the row stays locked until the commit, so that what is decided about it still holds then.

    Raises:
        NotFound: nobody has it, it was deleted, or it is another project's; the answer does not say which.
    """
    query = select(table).where(table.id == id, table.project_id == project_id, table.deleted_at.is_(None))
    if lock:
        query = query.with_for_update()
    row = session.scalar(query)
    if row is None:
        raise NotFound()
    return row
