"""Warm trainers: asks the zygote for a fork or, for one GPU, hands the order to a spare that already runs CUDA."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

import worker
from app.domain.errors import SystemFault
from worker.supervisor.environment import clean_environment
from worker.supervisor.server import Published, Server, Trainer

log = structlog.get_logger(__name__)

COMMAND = (sys.executable, "-P", "-m", "worker.trainer.zygote")  # -P: nothing is imported from the current folder


class Warm:
    """Keeps a zygote, and one spare per GPU, ready; replaces them when they die or when the code changes."""

    def __init__(
        self, *, cache: Path, gpus: Sequence[str] = (), command: Sequence[str] = COMMAND,
        on_ready: Callable[[Published], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._environment = clean_environment(dict(os.environ), cache)
        self._command, self._gpus, self._on_published = tuple(command), tuple(gpus), on_ready
        self._lock = threading.RLock()
        self._zygote: Server | None = None
        self._coming: Server | None = None
        self._spares: dict[str, Server] = {}
        self._signature: object = None
        self._failures, self._retry_at = 0, 0.0
        self._closed = False
        self.ready = threading.Event()

    def refresh(self) -> None:
        """Start what is missing; called now and then by the idle poll, and cheap when nothing is to be done."""
        with self._lock:
            signature = code_signature()
            if self._closed or time.monotonic() < self._retry_at:
                return
            if self._coming is None and (self._zygote is None or signature != self._signature):
                if self._zygote is not None:
                    log.info("the code of the worker changed: starting a new zygote")
                self._signature = signature
                self._coming = Server(self._command, self._environment, self._is_ready, self._has_ended)
            if self.ready.is_set():
                for gpu in self._gpus:
                    if gpu not in self._spares:
                        self._spares[gpu] = self._spare(gpu)

    def start(
        self,
        *,
        order: Path,
        log_file: Path,
        threads: int,
        gpus: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> Trainer:
        """Start a trainer on an order.

        Raises:
            SystemFault: no warm server could make one.
        """
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        request = {
            "order": str(order), "log": str(log_file), "threads": threads, "environment": visible | (environment or {}),
        }  # fmt: skip
        if len(gpus) == 1 and (spare := self._take_spare(gpus[0])) is not None:
            with contextlib.suppress(SystemFault):
                return spare.order(request)
        with self._lock:
            zygote = self._zygote
        if zygote is None or zygote.dead.is_set():
            raise SystemFault("No warm trainer is ready.", code="no_trainer", phase="start")
        return zygote.order(request)

    def close(self) -> None:
        """End the zygote, the spares and every trainer."""
        with self._lock:
            self._closed = True
            servers = [server for server in (self._zygote, self._coming, *self._spares.values()) if server is not None]
        for server in servers:
            server.close()
        for server in servers:
            server.dead.wait(6)

    def _spare(self, gpu: str) -> Server:
        environment = self._environment | {"CUDA_VISIBLE_DEVICES": gpu}
        return Server(self._command, environment, lambda *_: None, self._has_ended, "--device")

    def _take_spare(self, gpu: str) -> Server | None:
        with self._lock:
            spare = self._spares.get(gpu)
            if spare is None or not spare.ready.is_set() or spare.dead.is_set():
                return None  # a fork of the zygote starts CUDA by itself, only later
            self._spares[gpu] = self._spare(gpu)
            return spare

    def _is_ready(self, server: Server, published: Published | None) -> None:
        with self._lock:
            before, self._zygote, self._coming = self._zygote, server, None
            self._failures = 0
            spares, self._spares = list(self._spares.values()), {}
        if before is not None:
            before.retire()
        for spare in spares:
            spare.close()  # it runs the code of before
        log.info("zygote ready", pid=server.process.pid)
        self.ready.set()
        self._on_published(published or {})
        self.refresh()

    def _has_ended(self, server: Server) -> None:
        with self._lock:
            if server is self._zygote:
                self._zygote = None
                self.ready.clear()
            elif server is self._coming:
                self._coming = None
                self._failures += 1
                self._retry_at = time.monotonic() + min(2.0**self._failures, 60.0)
            else:
                for gpu, spare in list(self._spares.items()):
                    if spare is server:
                        del self._spares[gpu]
                return
            if self._closed:
                return
        log.warning("zygote ended", pid=server.process.pid, code=server.process.returncode)
        self.refresh()


def code_signature() -> object:
    """Say which code is on disk: a trainer must not run what was there an hour ago."""
    newest = count = 0
    for path in Path(worker.__path__[0]).rglob("*.py"):
        with contextlib.suppress(OSError):
            newest, count = max(newest, path.stat().st_mtime_ns), count + 1
    return newest, count
