"""`tuneyard up` as a process of its own, as a user has it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from app.client import Client

TUNEYARD = [sys.executable, "-m", "app.cli"]


def environment(home: Path) -> dict[str, str]:
    """Give a clean environment: nothing of the developer's own settings, nothing written elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNEYARD_")}
    # One thread: two of them on a machine that also runs other tests wait for each other most of the time.
    return kept | {
        "TUNEYARD_HOME": str(home),
        "COLUMNS": "200",
        "TUNEYARD_DRAIN_SECONDS": "5",
        "TUNEYARD_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


class Up:
    """A running stack."""

    def __init__(self, process: subprocess.Popen[str], home: Path, news: Path) -> None:
        self.process, self.home, self.news = process, home, news
        self.url = ""

    def await_ready(self, seconds: float = 300) -> None:
        """Read the ready line."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        line = self.process.stdout.readline()
        assert line.startswith("ready http://127.0.0.1:"), f"{line!r}\n{self.news.read_text()}"
        assert time.monotonic() < deadline
        self.url = line.split()[1]

    def client(self) -> Client:
        """Give a client that finds address and key in the home."""
        return Client(self.url, home=self.home)

    def family(self) -> list[psutil.Process]:
        """Give every process that the stack has started, and itself."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def child(self, words: str) -> psutil.Process:
        """Give the child whose command line has these words."""
        return next(one for one in psutil.Process(self.process.pid).children() if words in " ".join(one.cmdline()))

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def running(home: Path, *arguments: str, cwd: Path | None = None, **settings: str) -> Iterator[Up]:
    """Run a stack while the block lasts."""
    home.parent.mkdir(parents=True, exist_ok=True)
    news = home.parent / f"{home.name}.news"
    with news.open("w") as errors:
        process = subprocess.Popen(
            [*TUNEYARD, "up", "--home", str(home), "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=errors, text=True, cwd=cwd or home.parent,
            env=environment(home) | settings,
        )  # fmt: skip
    stack = Up(process, home, news)
    try:
        stack.await_ready()
        yield stack
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


def all_gone(processes: list[psutil.Process], seconds: float) -> list[str]:
    """Give the command lines of those that still run after so many seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [" ".join(one.cmdline()) for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
