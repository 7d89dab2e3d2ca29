"""The home of a one-machine stack: private, used by one stack at a time."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self


class HomeTaken(Exception):
    """Another stack runs on this home."""


class Home:
    """A folder held by a file lock; the kernel gives it back when this process ends, however that happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Inherited by no child: Python opens files close-on-exec.
        lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            where = _read(self.path / "url")
            raise HomeTaken(
                f"Another tuneyard runs on {self.path} (process {owner}{f', {where}' if where else ''}). "
                "Stop it, or give another --home."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        self.path.joinpath("url").unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.joinpath("url").unlink(missing_ok=True)
        if self._lock:
            self._lock.truncate(0)
            self._lock.close()

    def announce(self, url: str) -> None:
        """Leave the address for the command line, which finds it there."""
        (self.path / "url").write_text(url + "\n")

    @property
    def logs(self) -> Path:
        """Where the children's output goes."""
        return self.path / "logs"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
