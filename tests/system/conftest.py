"""Fixtures of the system level: one stack of real processes per kind of database, whole again for every test."""

import sys
from collections.abc import Iterator

import pytest

from tests.conftest import DATABASES
from tests.databases import template
from tests.system.stack import Stack


@pytest.fixture(scope="session", params=DATABASES)
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Give the stack as earlier tests left it."""
    folder = tmp_path_factory.mktemp("stack")
    url = template(request.param, folder, lambda: request.getfixturevalue("postgres_server"))()
    stack = Stack(folder / "home", url)
    yield stack
    stack.close()


@pytest.fixture
def stack(processes: Stack, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Give the stack with Redis, API and one worker, all alive, and an empty queue."""
    processes.forget_jobs()
    processes.ensure()
    failed = request.session.testsfailed
    yield processes
    if request.session.testsfailed > failed:
        sys.stderr.write(processes.log()[-20_000:])
        processes.forget_jobs(running=True)  # what it left would keep the next one waiting
