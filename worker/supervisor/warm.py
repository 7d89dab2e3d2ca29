"""Warm trainers: a fork of the zygote, which sees no GPU, or a process of its own that runs CUDA on a job's GPUs."""

import contextlib
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from app.domain.errors import SystemFault
from worker import sources
from worker.supervisor.environment import clean_environment
from worker.supervisor.server import Published, Server, Trainer

log = structlog.get_logger(__name__)

COMMAND = (sys.executable, "-P", "-m", "worker.trainer.zygote")  # -P: nothing is imported from the current folder
LONGEST_PAUSE_SECONDS = 60.0


@dataclass
class _Pause:
    """How long what died is left alone: twice as long each time."""

    failures: int = 0
    until: float = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def begin(self) -> None:
        self.failures += 1
        self.until = time.monotonic() + min(2.0 ** min(self.failures, 10), LONGEST_PAUSE_SECONDS)


class Warm:
    """Keeps a zygote, and one spare per GPU, ready; replaces them when they die or when the code changes.

    A job without GPUs is a fork of the zygote. The zygote must not see a GPU: the first backward pass of a process
    starts a thread for every GPU in sight, and CUDA that runs does not survive a fork either. A job with GPUs is the
    spare of its one GPU, or a new process that sees all of them.
    """

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
        self._taken: set[Server] = set()  # by a job with GPUs, and still alive
        self._signature: object = None
        self._pause = _Pause()
        self._pauses: defaultdict[str, _Pause] = defaultdict(_Pause)  # of the spares, by GPU
        self._closed = False
        self.ready = threading.Event()

    def refresh(self) -> None:
        """Start what is missing; called now and then by the idle poll, and cheap when nothing is to be done."""
        with self._lock:
            signature = code_signature()
            if self._closed:
                return
            outdated = self._zygote is None or signature != self._signature
            if self._coming is None and outdated and self._pause.over:
                if self._zygote is not None:
                    log.info("the code of the worker changed: starting a new zygote")
                self._signature = signature
                self._coming = self._server((), self._is_ready)
            self._start_spares()

    def start(
        self,
        *,
        order: Path,
        log_file: Path,
        threads: int,
        gpus: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Trainer:
        """Start a trainer on an order; with GPUs this may take as long as a new process needs to start CUDA.

        Args:
            check: called now and then meanwhile; what it raises ends the start.

        Raises:
            SystemFault: no server could make one.
        """
        request = {
            "order": str(order), "log": str(log_file), "threads": threads, "environment": environment or {},
        }  # fmt: skip
        if gpus:
            return self._start_on(tuple(gpus), request, check)
        with self._lock:
            zygote = self._zygote
        if zygote is None or zygote.dead.is_set():
            raise SystemFault("No warm trainer is ready.", code="no_trainer", phase="start")
        return zygote.order(request)

    def close(self) -> None:
        """End the zygote, the spares and every trainer."""
        with self._lock:
            self._closed = True
            everyone = (self._zygote, self._coming, *self._spares.values(), *self._taken)
            servers = [server for server in everyone if server is not None]
        for server in servers:
            server.close()
        for server in servers:
            server.dead.wait(6)

    def _start_on(self, gpus: tuple[str, ...], request: dict[str, Any], check: Callable[[], None]) -> Trainer:
        spare = self._take_spare(gpus)
        if spare is not None:
            with contextlib.suppress(SystemFault):
                trainer = _ordered(spare, request, check)
                with self._lock, contextlib.suppress(OSError):  # the next refresh tries again
                    self._pauses.pop(gpus[0], None)
                    self._start_spares()
                return trainer
        return _ordered(self._take_new(gpus), request, check)

    def _take_spare(self, gpus: tuple[str, ...]) -> Server | None:
        """Take the spare of the one GPU, although it may still be starting: a new process would need longer."""
        with self._lock:
            spare = self._spares.pop(gpus[0], None) if len(gpus) == 1 else None
            if spare is not None:
                self._taken.add(spare)
            return spare

    def _take_new(self, gpus: tuple[str, ...]) -> Server:
        with self._lock:
            if self._closed:
                raise SystemFault("No more trainers are started.", code="no_trainer", phase="start")
            server = self._server(gpus)
            self._taken.add(server)
            return server

    def _start_spares(self) -> None:
        if self._closed or not self.ready.is_set():
            return
        for gpu in self._gpus:
            if gpu not in self._spares and self._pauses[gpu].over:
                self._spares[gpu] = self._server((gpu,))

    def _server(
        self, gpus: tuple[str, ...], on_ready: Callable[[Server, Published | None], None] = lambda *_: None
    ) -> Server:
        environment = self._environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return Server(self._command, environment, on_ready, self._has_ended, *(("--device",) if gpus else ()))

    def _is_ready(self, server: Server, published: Published | None) -> None:
        with self._lock:
            before, self._zygote, self._coming = self._zygote, server, None
            self._pause = _Pause()
            self._pauses.clear()
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
            self._taken.discard(server)
            if server is self._zygote:
                self._zygote = None
                self.ready.clear()
            elif server is self._coming:
                self._coming = None
                self._pause.begin()
            else:
                self._has_lost(server)
                return
            if self._closed:
                return
        log.warning("zygote ended", pid=server.process.pid, code=server.process.returncode)
        self.refresh()

    def _has_lost(self, server: Server) -> None:
        """Leave the GPU alone for a while if this was its spare: a job may fill its memory, or it is broken."""
        for gpu, spare in list(self._spares.items()):
            if spare is server and not self._closed:
                del self._spares[gpu]
                self._pauses[gpu].begin()
                log.warning("spare ended", gpu=gpu, pid=server.process.pid, code=server.process.returncode)


def _ordered(server: Server, request: dict[str, Any], check: Callable[[], None]) -> Trainer:
    """Have the trainer made that a server with GPUs is there for; without it the server goes."""
    try:
        return server.order(request, check)
    except BaseException:
        server.close()
        raise


def code_signature() -> object:
    """Say which code is on disk: a trainer must not run what was there an hour ago."""
    found: dict[Path, int] = {}
    for _, path in sources.files():
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_mtime_ns
    return found
