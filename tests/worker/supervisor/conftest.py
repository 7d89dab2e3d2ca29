"""One worker with a fake trainer that goes wrong on demand, on each kind of database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.settings import Settings
from app.store.blobs import open_blobs
from app.store.session import make_engine
from tests.databases import Copy, template
from tests.fakes import COMMAND
from worker.supervisor.host import Host
from worker.supervisor.slots import Slots
from worker.supervisor.warm import Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    warm = Warm(cache=tmp_path_factory.mktemp("cache"), command=COMMAND)
    warm.refresh()
    assert warm.ready.wait(60)
    yield warm
    warm.close()


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def copy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return template(
        request.param, tmp_path_factory.mktemp("databases"), lambda: request.getfixturevalue("postgres_server")
    )


@pytest.fixture
def engine(copy: Copy) -> Iterator[Engine]:
    engine = make_engine(copy(), pool_size=5)
    yield engine
    engine.dispose()


@pytest.fixture
def host(engine: Engine, tmp_path: Path, warm: Warm) -> Iterator[Host]:
    # Only the heartbeat is short: a machine that stalls for some seconds must not lose a lease.
    settings = Settings(
        home=tmp_path, heartbeat_seconds=0.3, fence_seconds=30, lease_seconds=40, progress_seconds=300,
        drain_seconds=100,
    )  # fmt: skip  # pyright: ignore[reportCallIssue]
    host = Host(
        settings=settings, engine=engine, blobs=open_blobs(settings), slots=Slots(1), warm=warm, worker="wrk_test",
        threads=1, announce=lambda _job, _internal: None,
    )  # fmt: skip
    yield host
    assert host.slots.busy == 0
    assert not host.runs
    assert not list((tmp_path / "scratch").glob("*/*"))
