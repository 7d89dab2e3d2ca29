"""Uploads against a real server process: constant memory, and nothing left of what was cut off."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from app.settings import Settings
from app.store import migrate
from tests.waiting import until

pytestmark = pytest.mark.routes
MIB = 2**20


@dataclass(frozen=True)
class Api:
    """A running API process."""

    url: str
    port: int
    home: Path
    key: str
    process: psutil.Process
    cpu_seconds_to_start: float

    @property
    def rss(self) -> float:
        """Resident memory, MiB."""
        return self.process.memory_info().rss / MIB


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Run the API as `tuneyard up` and the image run it."""
    home = tmp_path_factory.mktemp("api")
    migrate.upgrade(Settings(home=home).database)  # pyright: ignore[reportCallIssue]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    begin = time.monotonic()
    log = home / "log"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port),
            "--no-access-log", "--timeout-graceful-shutdown", "3",
        ],
        env=os.environ | {"TUNEYARD_HOME": str(home), "TUNEYARD_FREE_SPACE_FLOOR_BYTES": "0"},
        stderr=os.open(log, os.O_WRONLY | os.O_CREAT),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            httpx.get(f"{url}/healthz", trust_env=False)
            break
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - begin < 120
            time.sleep(0.05)
    running = psutil.Process(process.pid)
    cpu = running.cpu_times()
    yield Api(url, port, home, (home / "key").read_text().strip(), running, cpu.user + cpu.system)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 or process.returncode == -signal.SIGTERM


def client(api: Api) -> httpx.Client:
    return httpx.Client(
        base_url=api.url, headers={"Authorization": f"Bearer {api.key}"}, timeout=120, trust_env=False
    )  # fmt: skip


def test_starts_fast_and_small(api: Api) -> None:
    assert api.cpu_seconds_to_start < 4  # of the processor, which a busy machine does not stretch
    assert api.rss < 160


def test_300_megabytes_in_constant_memory(api: Api) -> None:
    block = os.urandom(MIB)
    digest = hashlib.sha256()
    peak = 0.0

    def body() -> Iterator[bytes]:
        nonlocal peak
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="big.zip"\r\n\r\n'
        for number in range(300):
            piece = number.to_bytes(4, "big") + block[4:]
            digest.update(piece)
            yield piece
            peak = max(peak, api.rss)
        yield b'\r\n--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nbig\r\n--x--\r\n'

    with client(api) as http:
        made = http.post("/v1/datasets", content=body(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    peak = max(peak, api.rss)
    assert made.status_code == 202, made.text
    assert made.json()["bytes"] == 300 * MIB
    assert peak < 200
    sha256 = digest.hexdigest()
    assert (api.home / "blobs" / sha256[:2] / sha256).stat().st_size == 300 * MIB
    assert os.listdir(api.home / "blobs" / "incoming") == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_cut_off_leaves_nothing(api: Api, declared: bool) -> None:
    incoming = api.home / "blobs" / "incoming"
    length = "Content-Length: 999999999" if declared else "Transfer-Encoding: chunked"
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n' + bytes(3 * MIB)
    with client(api) as http:
        before = http.get("/v1/datasets").json()
        with socket.create_connection(("127.0.0.1", api.port)) as connection:
            connection.sendall(
                f"POST /v1/datasets HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n{length}\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\nIdempotency-Key: cut-{declared}\r\n\r\n".encode()
            )
            connection.sendall(start if declared else f"{len(start):x}\r\n".encode() + start + b"\r\n")
            until(lambda: any(path.stat().st_size > MIB for path in incoming.iterdir()))
        until(lambda: os.listdir(incoming) == [])
        assert http.get("/v1/datasets").json() == before
        again = http.post(
            "/v1/datasets",
            files={"file": b"x"},
            data={"name": f"{declared}"},
            headers={"Idempotency-Key": f"cut {declared}".replace(" ", "-")},
        )
        assert again.status_code == 202, "the key of the call that was cut off is free again"
