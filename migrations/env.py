"""How Alembic reaches the database: over the connection that `app.store.migrate` made, or one of its own making."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection

from app.store import tables
from app.store.clock import Now


def _render(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    # Alembic renders expressions by compiling them for one database; the clock's differs, so it is named instead.
    return "Now()" if kind == "server_default" and isinstance(getattr(item, "arg", item), Now) else False


def run(connection: Connection) -> None:
    """Run the migrations on this connection, in the transaction that is open on it."""
    context.configure(
        connection=connection,
        target_metadata=tables.Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",  # SQLite cannot alter a column in place
        render_item=_render,
    )
    with context.begin_transaction():
        context.run_migrations()


connection = context.config.attributes.get("connection")
if connection is not None:
    run(connection)
else:  # the `alembic` command line, to write the next revision
    from app.settings import Settings
    from app.store.migrate import schema_transaction

    with schema_transaction(Settings().database) as own:  # pyright: ignore[reportCallIssue]
        run(own)
