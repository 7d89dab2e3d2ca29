"""What tests of the store share: a queued job, one that is held, and some bytes."""

import pytest
from sqlalchemy import Engine

from app.store import tables
from app.store.attempts import Held
from app.store.blobs import Blobs, Stored
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
