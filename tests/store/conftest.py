"""What tests of the store share: a queued job, one that is held, some bytes, and each kind of store for them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.settings import Settings
from app.store import tables
from app.store.attempts import Held
from app.store.blobs import Blobs, Stored, open_blobs
from app.store.session import transaction
from tests.factories import make_blob, make_job, make_project
from tests.store.holding import read, take


@pytest.fixture
def job(engine: Engine) -> tables.Job:
    with transaction(engine) as session:
        return make_job(session, make_project(session))


@pytest.fixture
def held(engine: Engine, job: tables.Job) -> Held:
    with transaction(engine) as session:
        return take(session, read(session, job))


@pytest.fixture
def blob(engine: Engine, blobs: Blobs) -> Stored:
    return make_blob(engine, blobs)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Serve S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_settings(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a bucket that exists."""
    import httpx

    httpx.put(f"{s3_endpoint}/bucket").raise_for_status()
    return Settings.model_validate(
        {
            "home": tmp_path_factory.mktemp("s3-home"), "blobs": "s3://bucket/some/prefix", "s3_endpoint": s3_endpoint,
            "s3_access_key_id": "id", "s3_secret_access_key": "secret",
        }
    )  # fmt: skip


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """Each kind of store in turn; the local one is empty."""
    if request.param == "s3":
        return open_blobs(request.getfixturevalue("s3_settings"))
    return open_blobs(Settings.model_validate({"home": tmp_path / "home"}))
