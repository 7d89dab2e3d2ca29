"""What a test of threads or processes waits for: a condition, or the end of a process."""

import time
from collections.abc import Callable
from typing import Any

import psutil


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "it never came") -> Any:
    """Wait for something to be true, and give it; the patience is that of a machine which stalls now and then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def dead(pid: int) -> bool:
    """Say whether a process is gone, or only waits for somebody to collect it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Clock:
    """Stands in for the module `time` where a test says itself how late it is."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now
