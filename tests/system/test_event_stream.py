"""An open event stream and a server that is told to go."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from app.store import migrate
from app.store.session import make_engine, transaction
from tests import factories
from tests.factories import tables
from tests.waiting import until

pytestmark = pytest.mark.system


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").is_success
    except httpx.ConnectError:
        return False


def test_a_signal_ends_an_open_stream_at_once(tmp_path: Path) -> None:
    url, port = f"sqlite:///{tmp_path / 'tuneyard.db'}", free_port()
    migrate.upgrade(url)
    environment = {
        **os.environ,
        "TUNEYARD_HOME": str(tmp_path),
        "TUNEYARD_PORT": str(port),
        "TUNEYARD_LOG_LEVEL": "error",
    }
    # No `--timeout-graceful-shutdown`: without our help uvicorn would wait for the stream for ever.
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)], env=environment
    )
    try:
        base = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=base, trust_env=False, timeout=60) as client:
            until(lambda: answers(client), 120)
            client.headers["Authorization"] = f"Bearer {(tmp_path / 'key').read_text().strip()}"
            project = client.get("/v1/me").json()["project"]["id"]
            engine = make_engine(url)
            with transaction(engine) as session:
                job = factories.make_job(session, session.get_one(tables.Project, project)).id
            engine.dispose()
            with client.stream("GET", f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as response:
                lines = response.iter_lines()
                assert next(lines) == "id: 1"
                server.send_signal(signal.SIGTERM)
                started = time.monotonic()
                for _ in lines:  # it ends as an answer does: a break would raise
                    assert time.monotonic() - started < 30, "the stream went on"
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
