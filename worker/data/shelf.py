"""Derived data on disk that can always be made again: decoded images, features of a frozen prefix.

An entry is a folder of files that appears complete, by one rename. All jobs of a host share the shelf and its budget;
who wants what another is just making waits for it. When the budget is full, what was not used for longest goes first.
What is being made has its whole size from its first moment, so it counts as well; what a dead process was making goes
as soon as anybody looks, because its lock went with it.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from worker.disk import amount, is_full, sync
from worker.report import Order

FREE_FLOOR_BYTES = 256 * 2**20
WAIT_SECONDS = 0.1
FOLDER = "shelf"  # below the cache that the jobs of a host share


class NoRoom(Exception):
    """An entry cannot be kept; the text is the limit that leaves no room for it."""


def entry_key(kind: str, *parts: object) -> str:
    """Give the key of an entry: its kind, and a hash of everything that decides its bytes."""
    return f"{kind}-{hashlib.sha256('/'.join(map(repr, parts)).encode()).hexdigest()[:40]}"


def shelf_of(order: Order) -> "Shelf":
    """Give the shelf that all jobs of the host share."""
    return Shelf(Path(order.cache) / FOLDER, order.cache_bytes)


class Shelf:
    """One folder of entries under a budget in bytes."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes

    def shortage(self, needed_bytes: int, *, beside: Collection[str] = ()) -> str | None:
        """Say which limit leaves no room for an entry, were there nothing else but those `beside` it; None: neither."""
        self._folder.mkdir(parents=True, exist_ok=True)
        sizes = {path.name: _size(path) for path in self._folder.iterdir()}
        kept = sum(sizes.get(each, 0) for each in beside)
        if needed_bytes + kept > self._budget:
            others = f", {amount(kept)} of it for what is read with it" if kept else ""
            return f"TUNEYARD_CACHE_BYTES allows {amount(self._budget)}{others}"
        left = shutil.disk_usage(self._folder).free + sum(sizes.values()) - kept - FREE_FLOOR_BYTES
        if needed_bytes > left:
            return (
                f"the worker's disk has room for {amount(max(left, 0))} (TUNEYARD_CACHE_BYTES would allow "
                f"{amount(self._budget)})"
            )
        return None

    def get(
        self, key: str, sizes: Mapping[str, int], make: Callable[[Path], None], *,
        waiting: Callable[[], None] = lambda: None,
    ) -> tuple[Path, bool]:  # fmt: skip
        """Give the entry's folder, and whether `make(folder)` had to make it: its files have these sizes already.

        `waiting` is called now and then while others make this entry, or others that leave no room for it.

        Raises:
            NoRoom: the budget or the disk does not hold it.
        """
        entry, partial = self._folder / key, self._folder / f".{key}.part"
        if _use(entry, sizes):
            return entry, False
        short = self.shortage(sum(sizes.values()))
        if short is not None:
            raise NoRoom(short)
        with self._locked(key, waiting):
            if _use(entry, sizes):
                return entry, False
            try:
                while not self._reserved(entry, partial, sizes, waiting):
                    waiting()
                    time.sleep(WAIT_SECONDS)
                make(partial)
                for file in sizes:
                    sync(partial / file)  # a power cut after the rename would leave files of the right size, empty
                os.utime(partial)  # used from now on, however long it took to make
                partial.rename(entry)
            except OSError as error:
                if is_full(error):
                    raise NoRoom(f"the worker's disk is full: {error.strerror}") from error
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return entry, True

    def _reserved(self, entry: Path, partial: Path, sizes: Mapping[str, int], waiting: Callable[[], None]) -> bool:
        """Take the room for an entry; False while what others are making leaves none."""
        with self._locked("room", waiting):
            shutil.rmtree(partial, ignore_errors=True)  # of a process that died: the lock is ours
            self._remove(entry)  # damaged, if it is there
            if not self._make_room(sum(sizes.values())):
                return False
            partial.mkdir()
            for file, size in sizes.items():
                with (partial / file).open("wb") as opened:
                    if size:
                        # Reserved, because a full disk under a memory map is a fatal signal and no error.
                        os.posix_fallocate(opened.fileno(), 0, size)
            return True

    def _make_room(self, needed_bytes: int) -> bool:
        """Remove entries, oldest first; False where even that would not do until others have made theirs.

        Raises:
            NoRoom: processes that read what was removed keep its bytes, and the disk has no others.
        """
        making = self._being_made()
        aged: list[tuple[float, int, Path]] = []
        for entry in self._folder.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):
                aged.append((entry.stat().st_mtime, _size(entry), entry))
        held = sum(size for _, size, _ in aged)

        def fits(held: int, to_come: int = 0) -> bool:
            free = shutil.disk_usage(self._folder).free + to_come
            return making + held + needed_bytes <= self._budget and free >= needed_bytes + FREE_FLOOR_BYTES

        if making and not fits(0, held):
            return False
        for _, size, entry in sorted(aged):
            if fits(held):
                break
            self._remove(entry)
            held -= size
        if not fits(held):
            raise NoRoom(
                f"the worker's disk has {amount(shutil.disk_usage(self._folder).free)} free beside running jobs"
            )
        return True

    def _being_made(self) -> int:
        """Weigh what others are making now, and remove what was being made by those who died."""
        found = 0
        for partial in self._folder.glob(".*.part"):
            lock = self._taken(partial.name[1 : -len(".part")])
            if lock is None:
                found += _size(partial)
            else:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
        return found

    def _remove(self, entry: Path) -> None:
        gone = self._folder / ".gone"
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            entry.rename(gone)  # so that nobody ever sees half an entry
            shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _locked(self, what: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Let one process at a time do something; the lock goes with its holder, however that ends."""
        while (lock := self._taken(what)) is None:
            waiting()
            time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            os.close(lock)

    def _taken(self, what: str) -> int | None:
        """Take a lock: its descriptor, to be closed; None while another has it."""
        descriptor = os.open(self._folder / f".{what}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor


def _use(entry: Path, sizes: Mapping[str, int]) -> bool:
    """Note that an entry is wanted; False where it is not there, or was cut short: its map would be a fatal signal."""
    try:
        if any((entry / file).stat().st_size != size for file, size in sizes.items()):
            return False
        os.utime(entry)
    except FileNotFoundError:
        return False
    return True


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            total += file.stat().st_size
    return total
