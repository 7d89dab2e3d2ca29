"""Databases of one test's own: copies of a migrated one, made in hundredths of a second."""

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from app.store import migrate

Copy = Callable[[], str]


def template(kind: str, folder: Path, postgres_url: Callable[[], str]) -> Copy:
    """Migrate a database of this kind once, and give a function that copies it and gives the copy's URL.

    `postgres_url` gives the address of a running server, and is called only where one is needed.
    """
    if kind == "sqlite":
        original = folder / "template.db"
        migrate.upgrade(f"sqlite:///{original}")

        def copy_file() -> str:
            path = folder / f"{secrets.token_hex(6)}.db"
            shutil.copy(original, path)
            return f"sqlite:///{path}"

        return copy_file
    server = postgres_url()
    name = f"template_{secrets.token_hex(6)}"
    _execute(server, f"create database {name}")
    migrate.upgrade(_named(server, name))

    def copy_database() -> str:
        copy = f"copy_{secrets.token_hex(6)}"
        _execute(server, f"create database {copy} template {name}")
        return _named(server, copy)

    return copy_database


def _execute(server: str, statement: str) -> None:
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _named(server: str, name: str) -> str:
    return make_url(server).set(database=name).render_as_string(hide_password=False)
