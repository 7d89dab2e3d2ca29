"""The supervisor's end of a trainer's wire, and the clocks that end a run: fence, progress, drain. Torch-free.

One thread per trainer reads its lines, sends the ticks and looks at the clocks. It touches neither SQL nor the disk
(but for the trainer's log), so that a database that hangs or a slow store never silences the ticks or delays a kill.
"""

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from worker.report import (
    Failed,
    Finished,
    Go,
    Instruction,
    Metrics,
    Planned,
    Progress,
    Report,
    Saved,
    Tick,
    Wish,
    read_report,
)  # fmt: skip
from worker.supervisor.deaths import Verdict
from worker.supervisor.server import Trainer

LINE_BYTES = 64 * 2**20  # a report of an ingest may name a hundred thousand bad files
BACKLOG = 10_000
BATCH_SECONDS = 0.02  # a talkative trainer is heard in batches, which costs a tenth of hearing each line
LOG_BYTES = 16 * 2**20
TICK_SECONDS = 1.0


class Wire:
    """Reads what the trainer of one attempt says, and tells it what is wanted."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        wish: Callable[[], Wish],
        confirmed: Callable[[], float],
        fence_seconds: float,
        progress_seconds: float,
        log_file: Path,
    ) -> None:
        """`confirmed` gives the monotonic time of the last heartbeat that the database accepted."""
        self.reports: queue.Queue[list[Report] | None] = queue.Queue(BACKLOG)  # None: the trainer says no more
        self.verdict: Verdict | None = None
        self._trainer, self._wish, self._confirmed = trainer, wish, confirmed
        self._fence_seconds, self._progress_seconds = fence_seconds, progress_seconds
        self._tick_seconds = min(TICK_SECONDS, fence_seconds / 8)
        self._log_file = log_file
        self._progressed = time.monotonic()
        self._last_progress: object = None
        self._done = False  # it has said its last word
        self._kill_at: tuple[float, Verdict] | None = None
        self._waker, self._wakened = socket.socketpair()
        for end in (self._waker, self._wakened, trainer.connection):
            end.setblocking(False)
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"wire-{trainer.pid}", daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Tell the trainer that its plan is committed."""
        self._send(Go())

    def poke(self) -> None:
        """Tell the trainer at once what is wanted now."""
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def kill(self, verdict: Verdict) -> None:
        """End the trainer, and remember why; the first reason counts."""
        if self.verdict is None:
            self.verdict = verdict
        self._trainer.kill()

    def kill_at(self, deadline: float, verdict: Verdict) -> None:
        """End the trainer unless it has ended by itself at this monotonic time; the earliest deadline counts."""
        if self._kill_at is None or deadline < self._kill_at[0]:
            self._kill_at = (deadline, verdict)

    def close(self) -> None:
        """Kill what still runs, and free the descriptors."""
        self._trainer.kill()
        self._trainer.wait(10)
        self.poke()
        self._thread.join(10)
        for end in (self._trainer.connection, self._waker, self._wakened):
            end.close()

    def _run(self) -> None:
        buffer = bytearray()
        open_wire, next_tick, last_read = True, 0.0, 0.0
        while True:
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + self._tick_seconds
                self._send(Tick(wanted=self._wish()))
                self._look_at_clocks(now)
                self._shorten_log()
            sources = [self._wakened, self._trainer.connection] if open_wire else [self._wakened]
            readable, _, _ = select.select(sources, [], [], max(next_tick - time.monotonic(), 0.0))
            if self._wakened in readable:
                with contextlib.suppress(OSError):
                    self._wakened.recv(4096)
                next_tick = 0.0
            gone = self._trainer.code is not None
            if open_wire and (gone or self._trainer.connection in readable):
                early = BATCH_SECONDS - (time.monotonic() - last_read)
                if early > 0:
                    time.sleep(early)
                open_wire, last_read = self._read(buffer, gone), time.monotonic()
                if not open_wire:
                    self.reports.put(None)
            if gone and not open_wire:
                return

    def _read(self, buffer: bytearray, gone: bool) -> bool:
        """Take what has arrived; False at the end of the wire, also when a stray child holds it open."""
        try:
            data = self._trainer.connection.recv(2**18)
        except BlockingIOError:
            return not gone
        except OSError:
            return False
        if not data:
            return False
        head, newline, rest = data.rpartition(b"\n")
        try:
            if newline:
                buffer += head
                reports = [read_report.validate_json(bytes(line)) for line in buffer.split(b"\n")]
                buffer.clear()
                for report in reports:
                    self._note(report)
                self.reports.put_nowait(reports)
            buffer += rest
            if len(buffer) > LINE_BYTES:
                raise ValueError("a line without an end")
        except (ValidationError, ValueError, queue.Full):
            self.kill("protocol")
            return False
        return True

    def _note(self, report: Report) -> None:
        """See whether this is progress, which a hung run does not make."""
        match report:
            case Progress():
                here = (report.phase, report.step, report.fraction)
                moved, self._last_progress = here != self._last_progress, here
            case Planned() | Metrics() | Saved():
                moved = True
            case Finished() | Failed():
                moved = self._done = True
            case _:
                moved = False
        if moved:
            self._progressed = time.monotonic()

    def _look_at_clocks(self, now: float) -> None:
        if now - self._confirmed() > self._fence_seconds:
            self.kill("fenced")  # nobody else may claim before it is dead
        elif self._kill_at is not None and now >= self._kill_at[0] and not self._done:
            self.kill(self._kill_at[1])
        elif now - self._progressed > self._progress_seconds and not self._done:
            self.kill("hung")

    def _send(self, instruction: Instruction) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._trainer.connection.send(instruction.model_dump_json().encode() + b"\n")

    def _shorten_log(self) -> None:
        with contextlib.suppress(OSError):
            if self._log_file.stat().st_size > LOG_BYTES:
                os.truncate(self._log_file, 0)
