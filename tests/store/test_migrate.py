"""The migrated schema is the schema of the tables, and migrating is safe to do from many processes at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, MetaData, create_engine, event, inspect, text

from app.store import migrate, tables
from app.store.session import make_engine

pytestmark = pytest.mark.store


def test_autogenerate_finds_nothing_to_do(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": False})
        assert compare_metadata(context, tables.Base.metadata) == []


def test_every_index_and_constraint_equals_the_tables(engine: Engine) -> None:
    """What Alembic does not compare: conditions of partial indexes, check constraints, defaults, cascades."""
    if engine.dialect.name == "sqlite":
        straight = create_engine("sqlite://")
        tables.Base.metadata.create_all(straight)
        assert _sqlite_schema(engine) == _sqlite_schema(straight)
        straight.dispose()
        return
    migrated = _postgres_schema(engine, "public")
    copy = MetaData(naming_convention=tables.NAMING, schema="straight")
    for table in tables.Base.metadata.sorted_tables:
        table.to_metadata(copy, schema="straight")
    with engine.begin() as connection:
        connection.exec_driver_sql("create schema straight")
        copy.create_all(connection)
    try:
        assert migrated == _postgres_schema(engine, "straight")
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("drop schema straight cascade")


def _sqlite_schema(engine: Engine) -> dict[str, set[str]]:
    query = "select name, sql from sqlite_master where sql is not null and name != 'alembic_version'"
    with engine.connect() as connection:
        rows = connection.execute(text(query)).all()
    # The order of columns and constraints says nothing; each line of the DDL does.
    return {name: {line.strip().rstrip(",") for line in sql.splitlines()} for name, sql in rows}


def _postgres_schema(engine: Engine, schema: str) -> set[tuple[str, ...]]:
    constraints = """
        select rel.relname, con.conname, pg_get_constraintdef(con.oid) from pg_constraint con
        join pg_class rel on rel.oid = con.conrelid join pg_namespace space on space.oid = rel.relnamespace
        where space.nspname = :schema"""
    indexes = "select tablename, indexname, indexdef from pg_indexes where schemaname = :schema"
    columns = """
        select table_name, column_name, concat_ws(' ', data_type, character_maximum_length, is_nullable, column_default)
        from information_schema.columns where table_schema = :schema"""
    with engine.connect() as connection:
        return {
            tuple(str(value).replace(f"{schema}.", "") for value in row)
            for query in (constraints, indexes, columns)
            for row in connection.execute(text(query), {"schema": schema})
            if row[0] != "alembic_version"
        }


def test_the_database_stands_at_head(engine: Engine) -> None:
    assert migrate.current(engine) == migrate.head()


def test_an_empty_database_has_no_revision(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    assert migrate.current(engine) is None
    engine.dispose()


def test_upgrade_makes_the_folder_and_is_harmless_to_repeat(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new 100% folder' / 'tuneyard.db'}"
    migrate.upgrade(url)
    migrate.upgrade(url)
    engine = make_engine(url)
    assert migrate.current(engine) == migrate.head()
    engine.dispose()


def test_a_failing_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All or nothing: a half-migrated database would be nobody's schema."""
    url = f"sqlite:///{tmp_path / 'tuneyard.db'}"
    real = migrate.make_engine

    def breaking(url: str) -> Engine:
        engine = real(url)

        @event.listens_for(engine, "before_cursor_execute")
        def _break(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
            if "CREATE TABLE workers" in statement:
                raise RuntimeError("the power went out")

        return engine

    monkeypatch.setattr(migrate, "make_engine", breaking)
    with pytest.raises(RuntimeError, match="the power went out"):
        migrate.upgrade(url)
    engine = make_engine(url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_many_processes_may_upgrade_at_once(database_url: str, tmp_path: Path) -> None:
    if database_url.startswith("sqlite"):
        url = f"sqlite:///{tmp_path / 'race.db'}"
    else:
        maker = make_engine(database_url).execution_options(isolation_level="AUTOCOMMIT")
        with maker.connect() as connection:
            connection.exec_driver_sql("create database race")
        maker.dispose()
        url = database_url.replace("/postgres?", "/race?")
        assert url != database_url
    code = "import sys; from app.store import migrate; migrate.upgrade(sys.argv[1])"
    racers = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(4)]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0, 0]
    engine = make_engine(url)
    assert migrate.current(engine) == migrate.head()
    engine.dispose()


def test_migrations_are_found_from_any_folder(tmp_path: Path) -> None:
    """An installed wheel has no pyproject.toml beside it."""
    code = "from app.store import migrate; print(migrate.head())"
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == migrate.head()
