"""Recipes and architectures: what the workers published, and all that the API knows of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.domain.errors import Unavailable
from app.domain.recipes import Published
from app.store import tables
from app.store.clock import Now

Json = dict[str, Any]


def publish(session: Session, catalogue: Mapping[str, Sequence[Json]]) -> None:
    """Write what a worker can run: `{"recipes": [...], "architectures": [...]}`, rows keyed by column.

    A row replaces the one of its name. Names that only another worker knows stay: workers of two versions may serve at
    once, and the trainer checks every spec again.
    """
    # Two workers may start in the same second: one statement per row, in one order, so neither can fail the other.
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    for table, rows in ((tables.Recipe, catalogue["recipes"]), (tables.Architecture, catalogue["architectures"])):
        columns = {column.name for column in table.__table__.columns}
        for row in sorted(rows, key=lambda row: row["name"]):
            values = {key: value for key, value in row.items() if key in columns} | {"published_at": Now()}
            session.execute(
                insert(table).values(**values).on_conflict_do_update(index_elements=[table.name], set_=values)
            )


def require_published(session: Session) -> None:
    """Refuse to say anything about recipes while no worker has spoken yet.

    Raises:
        Unavailable: nothing was ever published.
    """
    if not session.scalar(select(exists().where(tables.Recipe.name.is_not(None)))):
        raise Unavailable(
            "No worker has published its recipes yet; start one, or try again in a moment.",
            code="recipes_unavailable", retry_after=2,
        )  # fmt: skip


def every(session: Session) -> Sequence[tables.Recipe]:
    """Give all recipes by name."""
    return session.scalars(select(tables.Recipe).order_by(tables.Recipe.name)).all()


def find(session: Session, name: str) -> tables.Recipe | None:
    """Give the recipe of this name."""
    return session.get(tables.Recipe, name)


def names(session: Session) -> list[str]:
    """Give the names of all recipes."""
    return list(session.scalars(select(tables.Recipe.name).order_by(tables.Recipe.name)))


def every_architecture(session: Session) -> Sequence[tables.Architecture]:
    """Give all architectures by name."""
    return session.scalars(select(tables.Architecture).order_by(tables.Architecture.name)).all()


class Recipes(Mapping[str, Published]):
    """Every published recipe by name, each read when it is asked for."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getitem__(self, name: str) -> Published:
        row = find(self._session, name)
        if row is None:
            raise KeyError(name)
        return Published(row.name, row.kind, row.version, row.tasks, row.schema, row.defaults, row.requires)

    def __iter__(self) -> Iterator[str]:
        return iter(names(self._session))

    def __len__(self) -> int:
        return len(names(self._session))


class Architectures(Mapping[str, Mapping[str, Any]]):
    """The facts of every architecture by name, each read when it is asked for: there are about a hundred."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        found = self._session.get(tables.Architecture, name)
        if found is None:
            raise KeyError(name)
        return found.facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._session.scalars(select(tables.Architecture.name).order_by(tables.Architecture.name)).all())

    def __len__(self) -> int:
        return len(list(iter(self)))
