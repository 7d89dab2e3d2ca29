"""Derived data on disk that can always be made again: decoded images, features of a frozen prefix.

An entry is a folder that appears complete, by one rename. All jobs of a host share the shelf; who wants what another
is just making waits for it. When the budget is full, what was not used for longest goes first.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.domain.errors import ResourceFault
from worker.disk import is_full

FREE_FLOOR_BYTES = 256 * 2**20
WAIT_SECONDS = 0.1


class Shelf:
    """One folder of entries under a budget in bytes."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes

    def has_room(self, key: str, needed_bytes: int) -> bool:
        """Say whether this entry is there or may be made, were the shelf empty of everything else."""
        if (self._folder / key).exists():
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        held = sum(_size(entry) for entry in self._entries())
        free = shutil.disk_usage(self._folder).free + held
        return needed_bytes <= self._budget and needed_bytes + FREE_FLOOR_BYTES <= free

    def get(
        self, key: str, needed_bytes: int, make: Callable[[Path], None], *, waiting: Callable[[], None] = lambda: None
    ) -> Path:
        """Give the entry's folder, made by `make(folder)` if it is not there. `waiting` is called now and then.

        Raises:
            ResourceFault: the disk is full.
        """
        entry = self._folder / key
        if _use(entry):
            return entry
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._making(key, waiting):
            if _use(entry):
                return entry
            self._make_room(needed_bytes)
            partial = self._folder / f".{key}.{os.getpid()}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(entry)
            except OSError as error:
                if is_full(error):
                    raise ResourceFault(
                        f"The disk is full: {needed_bytes / 1e6:.0f} MB of decoded data could not be kept.",
                        code="disk_full", hint="Free space on the worker, or lower TUNEYARD_CACHE_BYTES, then /retry.",
                    ) from error  # fmt: skip
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return entry

    def remove(self, key: str) -> None:
        """Remove an entry that turned out to be damaged; who reads it keeps its bytes."""
        entry, gone = self._folder / key, self._folder / f".gone.{key}.{os.getpid()}"
        with contextlib.suppress(OSError):
            entry.rename(gone)  # so that nobody ever sees half an entry
            shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _making(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Let one process at a time make an entry; the lock goes with its holder, however that ends."""
        path = self._folder / f".{key}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting()
                    time.sleep(WAIT_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _entries(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [entry for entry in self._folder.iterdir() if not entry.name.startswith(".")]
        return []

    def _make_room(self, needed_bytes: int) -> None:
        """Remove entries, oldest first. A process that reads one keeps its bytes: they are only unlinked."""
        aged: list[tuple[float, int, Path]] = []
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                aged.append((entry.stat().st_mtime, _size(entry), entry))
        total = sum(size for _, size, _ in aged)
        for _, size, entry in sorted(aged):
            free = shutil.disk_usage(self._folder).free
            if total + needed_bytes <= self._budget and free >= needed_bytes + FREE_FLOOR_BYTES:
                break
            self.remove(entry.name)
            total -= size


def _use(entry: Path) -> bool:
    try:
        os.utime(entry)
    except FileNotFoundError:
        return False
    return True


def _size(entry: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in entry.iterdir():
            total += file.stat().st_size
    return total
