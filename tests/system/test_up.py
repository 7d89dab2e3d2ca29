"""The one-machine stack: ready means ready, one per home, and no process outlives it."""

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.system.up import TUNEYARD, all_gone, environment, running

pytestmark = pytest.mark.system


def test_ready_means_that_a_job_runs_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "a home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with running(home, cwd=elsewhere) as stack:
        with stack.client() as client:
            dataset = client.datasets.create("digits", builtin="digits")
            assert client.datasets.wait(dataset["id"], timeout=240)["status"] == "ready"
            job = client.jobs.submit(
                {"recipe": "autoencoder", "dataset": dataset["id"], "model": {"architecture": "small_cnn"},
                 "training": {"epochs": 1}}
            )  # fmt: skip
            ended = client.jobs.wait(job["id"], timeout=240)
            assert ended["status"] == "succeeded", ended["error"]

        assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
        assert (home / "url").read_text().strip() == stack.url
        assert list(elsewhere.iterdir()) == [], "something was written outside the home"
        shown = [" ".join(one.cmdline()) for one in stack.family()]
        assert not any("requirepass" in line or "ty_" in line for line in shown), "a secret stands in a command line"

        second = subprocess.run(
            [*TUNEYARD, "up", "--home", str(home), "--port", "0", "--json"],
            env=environment(home), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        message = json.loads(second.stdout)["error"]["message"]
        assert str(stack.process.pid) in message
        assert stack.url in message

        family = stack.family()
        assert len(family) >= 4
        assert stack.end(signal.SIGINT) == 0
        assert all_gone(family, 60) == []
        assert not (home / "url").exists()


def test_a_killed_stack_leaves_nothing_and_starts_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running(home) as stack:
        with stack.client() as client:
            dataset = client.datasets.create("digits", builtin="digits")["id"]
            client.datasets.wait(dataset, timeout=240)
        family = stack.family()
        stack.process.kill()
        assert all_gone(family, 60) == []
    with running(home) as again, again.client() as client:
        assert client.datasets.get(dataset)["status"] == "ready"


def test_a_dead_child_is_started_again_and_requests_wait_for_the_api(tmp_path: Path) -> None:
    with running(tmp_path / "home") as stack:
        before = {name: stack.child(name).pid for name in ("uvicorn", "worker.main", "redis-server")}
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        # The socket is the parent's: nobody is refused.
        assert httpx.get(f"{stack.url}/healthz", timeout=120, trust_env=False).status_code == 200
        deadline = time.monotonic() + 180
        with stack.client() as client:
            while True:
                alive = [worker for worker in client.workers()["data"] if worker["alive"]]
                if (
                    len(alive) == 2 and client.ready()["status"] == "ok"
                ):  # the killed one is listed until its lease ends
                    break
                assert time.monotonic() < deadline, (alive, client.ready())
                time.sleep(0.3)
        after = {name: stack.child(name).pid for name in before}
        assert all(after[name] != before[name] for name in before)
        assert "worker ended by SIGKILL" in stack.news.read_text()


def test_a_port_that_is_taken_is_said_plainly(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*TUNEYARD, "up", "--home", str(tmp_path), "--port", port],
            env=environment(tmp_path), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert port in done.stderr
    assert "--port 0" in done.stderr
    assert done.stdout == ""


def test_a_database_that_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    settings = environment(tmp_path) | {"TUNEYARD_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none"}
    done = subprocess.run(
        [*TUNEYARD, "up", "--home", str(tmp_path), "--port", "0"],
        env=settings, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "database" in done.stderr
    assert "Traceback" not in done.stderr
