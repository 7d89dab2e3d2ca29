"""What one worker process has, for all the runs that it supervises."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sqlalchemy import Engine

from app.settings import Settings
from app.store.blobs import Blobs
from worker.supervisor.slots import Slots
from worker.supervisor.warm import Warm

Source = Literal["message", "poll"]  # how a job was found


class Running(Protocol):
    """A run under way."""

    def poke(self) -> None:
        """Ask at once what is wanted of it."""
        ...

    def changed(self) -> None:
        """Tell the trainer that something else may be wanted."""
        ...


@dataclass
class Host:
    """What one worker process has; shared by its runs."""

    settings: Settings
    engine: Engine
    blobs: Blobs
    slots: Slots
    warm: Warm
    worker: str  # the id under which it holds jobs
    threads: int
    announce: Callable[[str, bool], None]  # tells of a job that can be claimed
    draining: threading.Event = field(default_factory=threading.Event)
    drain_at: float = float("inf")  # when a drain began, monotonic
    runs: dict[str, Running] = field(default_factory=dict)

    def drain(self) -> None:
        """Take no more jobs, and ask the running ones for a checkpoint; safe in a signal handler."""
        self.drain_at = min(self.drain_at, time.monotonic())
        self.draining.set()
