"""Bring a database to the newest schema."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event, make_url

import migrations
from app.store.session import make_engine

_LOCK = 0x74756E65  # "tune": the advisory lock that lets one process migrate at a time


def upgrade(url: str) -> None:
    """Apply every missing migration in one transaction; any number of processes may call this at once."""
    with schema_transaction(url) as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def head() -> str:
    """Give the newest revision that this code knows."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None, "the migrations folder holds at least one revision"
    return revision


def current(engine: Engine) -> str | None:
    """Give the revision of a database, or None for an empty one."""
    with engine.execution_options(read_only=True).connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def schema_transaction(url: str) -> Iterator[Connection]:
    """Open one transaction that no other migration runs beside."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url)
    if engine.dialect.name == "sqlite":
        # A table is altered by copying it; with foreign keys on, dropping the old one would cascade. Inside a
        # transaction this pragma does nothing, so it comes with the connection.
        event.listen(engine, "connect", _foreign_keys_off)
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"select pg_advisory_xact_lock({_LOCK})")
            yield connection
    finally:
        engine.dispose()


def _foreign_keys_off(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=OFF")


def _config() -> Config:
    # Located by import, not by pyproject.toml, which an installed wheel does not carry.
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])).replace("%", "%%"))
    return config
