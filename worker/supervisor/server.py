"""The processes that make trainers, and the trainers that they made."""

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

from app.domain.errors import SystemFault

log = structlog.get_logger(__name__)

Published = dict[str, list[dict[str, Any]]]
READY_SECONDS = 120.0  # to import torch and start CUDA on every GPU of a job
CHECK_SECONDS = 0.25  # between two looks at what else is wanted meanwhile
ANSWER_SECONDS = 30.0
KILLED = -int(signal.SIGKILL)


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
    """One process that makes trainers: a zygote, or one with GPUs which becomes the trainer of its one order."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        on_ready: Callable[["Server", Published | None], None],
        on_end: Callable[["Server"], None],
        *options: str,
    ) -> None:
        self._ready_by = time.monotonic() + READY_SECONDS
        self.ready = threading.Event()
        self.dead = threading.Event()
        self._settled = threading.Event()  # ready, or dead before it was
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

    def order(self, request: dict[str, Any], check: Callable[[], None] = lambda: None) -> Trainer:
        """Have a trainer made, as soon as the server is ready; `check` is called meanwhile, and may raise.

        Raises:
            SystemFault: the server died, does not become ready or does not answer.
        """
        while not self._settled.wait(CHECK_SECONDS) and time.monotonic() < self._ready_by:
            check()
        ours, theirs = socket.socketpair()
        with self._ordering, theirs:
            trainer = None
            with contextlib.suppress(OSError, queue.Empty):
                if self.ready.is_set() and not self.dead.is_set():
                    socket.send_fds(self._control, [json.dumps(request).encode() + b"\n"], [theirs.fileno()])
                    trainer = self._answers.get(timeout=ANSWER_SECONDS)
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
        """End the process and all its trainers: close the control socket, and kill what became a trainer itself."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        own = self._trainers.get(self.process.pid)
        if own is not None:
            own.kill()

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
            self._settled.set()
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
        else:  # it took an order and lives on as its trainer
            with contextlib.suppress(OSError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
                # Not yet reaped, the number still belongs to it: whatever it left running in its group goes first.
                os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        if own is not None:
            _await_end_of_group(own.pid)  # processes of the same run hold GPUs until they are gone
        for trainer in list(self._trainers.values()):
            if trainer is not own:
                trainer.kill()
                _await_death(trainer.pid)
            trainer.ended(code if trainer is own else KILLED)
        self._trainers.clear()
        self._control.close()
        self.dead.set()
        self._settled.set()
        self._answers.put(None)
        self._on_end(self)


def _await_end_of_group(group: int, timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)


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
