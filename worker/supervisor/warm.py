"""Warm trainers: asks the zygote for a fork or, for one GPU, hands the order to a spare that already runs CUDA."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

import worker
from app.domain.errors import SystemFault

log = structlog.get_logger(__name__)

Published = dict[str, list[dict[str, Any]]]
COMMAND = (sys.executable, "-P", "-m", "worker.trainer.zygote")  # -P: nothing is imported from the current folder
ANSWER_SECONDS = 30.0
KILLED = -int(signal.SIGKILL)

# What a trainer may inherit. Everything else stays out, above all the addresses and keys of databases and brokers.
_NAMES = frozenset({"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "TERM", "LD_LIBRARY_PATH", "LD_PRELOAD"})
_PREFIXES = (
    "LC_",
    "PYTHON",
    "VIRTUAL_ENV",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH",
    "SSL_CERT",
)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def clean_environment(source: dict[str, str], cache: Path) -> dict[str, str]:
    """Give the environment of a trainer: what it needs to run and to download public weights, and no credentials."""
    kept = {
        name: value
        for name, value in source.items()
        if name in _NAMES or name.startswith(_PREFIXES) or name.lower() in _PROXIES
    }
    return kept | {
        "OPENBLAS_NUM_THREADS": "1",  # a second thread before the fork would hang every child
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator starts one at import
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not start CUDA in the zygote
        "PYTHONUNBUFFERED": "1",
        "TORCH_HOME": kept.get("TORCH_HOME", str(cache / "torch")),
        "TORCHINDUCTOR_CACHE_DIR": kept.get("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor")),
    }


class Trainer:
    """A trainer process: our end of its wire, and its death."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.connection = pid, connection
        self.code: int | None = None
        self._gone = threading.Event()

    def kill(self) -> None:
        """End the whole process group at once; harmless when it is gone."""
        if not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end and give the exit code (negative for a signal), or None when it still runs."""
        self._gone.wait(timeout)
        return self.code

    def ended(self, code: int) -> None:
        """Note that the process is gone."""
        self.code = code
        self._gone.set()


class Server:
    """One process that makes trainers: a zygote, or a spare which becomes the trainer of its one order."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        on_ready: Callable[["Server", Published | None], None],
        on_end: Callable[["Server"], None],
        *options: str,
    ) -> None:
        self.ready = threading.Event()
        self.dead = threading.Event()
        self.retired = False
        self._on_ready, self._on_end = on_ready, on_end
        self._trainers: dict[int, Trainer] = {}
        self._answers: queue.Queue[Trainer | None] = queue.Queue()
        self._ordering = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), *options], pass_fds=[theirs.fileno()], env=environment,
                stdin=subprocess.DEVNULL, stdout=sys.__stderr__, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, name=f"server-{self.process.pid}", daemon=True).start()

    def order(self, request: dict[str, Any]) -> Trainer:
        """Have a trainer made.

        Raises:
            SystemFault: the server died or does not answer.
        """
        ours, theirs = socket.socketpair()
        with self._ordering, theirs:
            try:
                socket.send_fds(self._control, [json.dumps(request).encode() + b"\n"], [theirs.fileno()])
                trainer = self._answers.get(timeout=ANSWER_SECONDS)
            except (OSError, queue.Empty):
                trainer = None
        if trainer is None:
            ours.close()
            self.close()
            raise SystemFault("The server of warm trainers does not answer.", code="no_trainer", phase="start")
        trainer.connection = ours
        return trainer

    def retire(self) -> None:
        """Make no more trainers, and go when the last one has ended."""
        self.retired = True
        if not self._trainers:
            self.close()

    def close(self) -> None:
        """Close the control socket, which ends the process and all its trainers."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._control.makefile("rb") as lines:
            for line in lines:
                try:
                    self._take(json.loads(line))
                except Exception:  # the next line may be the death of a trainer, which somebody waits for
                    log.exception("an answer was not understood", pid=self.process.pid)
        self._bury()

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.ready.set()
            self._on_ready(self, message["ready"])
        elif "exit" in message:
            trainer = self._trainers.pop(message["pid"], None)
            if trainer is not None:
                trainer.ended(message["exit"])
            if self.retired and not self._trainers:
                self.close()
        else:
            # Registered here and not by the asker, so that a death which follows at once finds it.
            trainer = self._trainers[message["pid"]] = Trainer(message["pid"], self._control)
            self._answers.put(trainer)

    def _bury(self) -> None:
        """Its socket ended: see that the process and its trainers are really gone before anybody hears of it."""
        own = self._trainers.get(self.process.pid)
        if own is None:
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()  # a spare that took an order lives on as its trainer
        for trainer in list(self._trainers.values()):
            if trainer is not own:
                trainer.kill()
                _await_death(trainer.pid)
            trainer.ended(code if trainer is own else KILLED)
        self._trainers.clear()
        self._control.close()
        self.dead.set()
        self._answers.put(None)
        self._on_end(self)


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


def _await_death(pid: int, timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        time.sleep(0.01)
