"""One child process of the stack: started so that it cannot outlive us, started again when it dies."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LONGEST_PAUSE = 30.0
_SETTLED = 60.0  # a child that lived this long starts its count of deaths afresh
_LARGEST_LOG = 10 * 2**20


@dataclass
class Child:
    """A command that is kept running. `deaths` counts the ends in a row that nobody asked for."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    log: Path
    stdin: bytes | None = None  # written at every start, for secrets that must not stand in the command line
    keep: Sequence[int] = ()  # descriptors it inherits
    deaths: int = 0
    process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0
    _again: float = field(default=0.0, repr=False)

    def start(self) -> None:
        """Start it, its output going to its log. Call from a process without threads: it runs code after the fork."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > _LARGEST_LOG:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL if self.stdin is None else subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=tuple(self.keep),
                start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we end them in order
                preexec_fn=bind_to_parent(os.getpid()),  # safe: no threads, see above
            )
        self._started = time.monotonic()
        if self.stdin is not None and self.process.stdin:
            with self.process.stdin as pipe:
                pipe.write(self.stdin)

    def watch(self) -> str | None:
        """Start it again when it died and its pause is over; give one line to say when something happened."""
        now = time.monotonic()
        if self.process is None:
            if now < self._again:
                return None
            self.start()
            return f"{self.name} is started again"
        code = self.process.poll()
        if code is None:
            return None
        self.sweep()
        self.deaths = 1 if now - self._started > _SETTLED else self.deaths + 1
        pause = min(0.25 * 2**self.deaths, _LONGEST_PAUSE)
        self.process, self._again = None, now + pause
        return f"{self.name} ended {ending(code)}; it is started again in {pause:g} s (log: {self.log})"

    def alive(self) -> bool:
        """Say whether it runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def age(self) -> float:
        """Seconds since its last start."""
        return time.monotonic() - self._started

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def ended(self, seconds: float) -> bool:
        """Wait at most so long for its end."""
        if self.process is None:
            return True
        try:
            self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def sweep(self) -> None:
        """Kill what is left of it and of its group, and collect it."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its session is its group, and has its number
        self.process.wait()

    def tail(self, lines: int = 15) -> str:
        """Give the end of its log."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def bind_to_parent(parent: int) -> Callable[[], None] | None:
    """Give a function for a fresh child: the kernel kills it when `parent` dies, however that happens."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return bind


def ending(code: int) -> str:
    """Say an exit code in words."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
