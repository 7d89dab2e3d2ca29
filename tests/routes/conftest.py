"""The real application behind a real server on a real socket, once per kind of database; each test has its project."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine

from app.main import create_app
from app.settings import Settings
from app.store.session import transaction
from tests import factories


@dataclass(frozen=True)
class Service:
    """A running API."""

    url: str
    app: FastAPI
    settings: Settings


@contextmanager
def serve(app: FastAPI, settings: Settings) -> Iterator[Service]:
    """Run an application in a thread until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2, lifespan="on")
    )  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api", daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive(), "the API ended while it started"
        assert time.monotonic() < deadline, "the API did not start within two minutes"
        time.sleep(0.01)
    try:
        yield Service(f"http://127.0.0.1:{listener.getsockname()[1]}", app, settings)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the API did not stop"


@pytest.fixture(scope="session")
def service(settings: Settings) -> Iterator[Service]:
    """Run the API on the test's database."""
    quiet = settings.model_copy(update={"log_level": "error"})
    with serve(create_app(quiet), quiet) as running:
        yield running


@dataclass(frozen=True)
class Caller:
    """A project with a key, and an HTTP client that uses it."""

    project: str
    key: str
    http: httpx.Client


@pytest.fixture
def make_caller(service: Service, engine: Engine) -> Iterator[Callable[..., Caller]]:
    """Give a function that makes a key with the given scopes, in a new project or a given one, and its client."""
    opened: list[httpx.Client] = []

    def make(*scopes: str, project: str | None = None, **columns: Any) -> Caller:
        with transaction(engine) as session:
            if project is None:
                owner = factories.make_project(session)
            else:
                owner = session.get_one(factories.tables.Project, project)
            _, secret = factories.make_key(session, owner, scopes=scopes or ("read", "write", "admin"), **columns)
        http = httpx.Client(
            base_url=service.url, headers={"Authorization": f"Bearer {secret}"}, timeout=120, trust_env=False
        )  # fmt: skip
        opened.append(http)
        return Caller(owner.id, secret, http)

    yield make
    for client in opened:
        client.close()


@pytest.fixture
def caller(make_caller: Callable[..., Caller]) -> Caller:
    """Give a fresh project with a key for everything but operating."""
    return make_caller()


@pytest.fixture
def client(caller: Caller) -> httpx.Client:
    """Give the HTTP client of that project."""
    return caller.http


@pytest.fixture(scope="session")
def catalogue(engine: Engine) -> None:
    """Publish some recipes, as a worker would."""
    factories.publish_catalogue(engine)


@pytest.fixture
def anonymous(service: Service) -> Iterator[httpx.Client]:
    """Give a client without any key."""
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
        yield client


def assert_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Check that an answer is the one error body, and give what it says."""
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert {"type", "code", "message", "param", "details", "request_id"} <= set(error)
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["message"]
    assert "Traceback" not in response.text
    for detail in error["details"]:
        assert set(detail) == {"pointer", "message"}
    if code is not None:
        assert error["code"] == code, error
    return error
