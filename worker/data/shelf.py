"""Derived data on disk that can always be made again: decoded images, features of a frozen prefix.

An entry is a folder of files that appears complete, by one rename. All jobs of a host share the shelf and its budget;
who wants what another is just making waits for it. When the budget is full, what was not used for longest goes first,
and what is in use stays: whoever maps it would keep its bytes on the disk, whatever its folder looks like. What is
being made has its whole size from its first moment, so it counts as well; what a dead process was making goes as soon
as anybody looks, and what it used is free, because its locks went with it.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Entry:
    """An entry in use: it stays on the shelf as long as this object, or what was said to last with it, is there."""

    folder: Path
    made: bool  # only now; else it was found
    lock: int  # the descriptor of the folder with a shared lock on it, which no process inherits and none outlives

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.lock)

    def lasts_with(self, reader: object) -> None:
        """Leave the entry in use as long as `reader` is there."""
        weakref.finalize(reader, os.close, os.dup(self.lock))  # a lock is held until its last descriptor is closed


class Shelf:
    """One folder of entries under a budget in bytes."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes

    def shortage(
        self, wanted: Mapping[str, int], *, beside: Collection[str] = (), waiting: Callable[[], None] = lambda: None
    ) -> str | None:
        """Say which limit leaves no room for entries of these sizes; None: neither.

        What is on the shelf already takes no room; what nobody uses leaves its own.

        Args:
            beside: entries that are read together with them.
            waiting: as in `get`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked("room", waiting):
            spare = {entry.name for _, _, entry in self._unused()}
            sizes = {path.name: _size(path) for path in self._folder.iterdir()}
            there = {key for key, size in wanted.items() if sizes.get(key) == size}
            needed = sum(size for key, size in wanted.items() if key not in there)
            if not needed:
                return None
            near = there | set(beside)
            kept = sum(sizes.get(key, 0) for key in near)
            used = sum(size for key, size in sizes.items() if not key.startswith(".") and key not in spare | near)
            to_come = sum(sizes.values()) - kept - used  # with what is being made, which may be the very same
            return self._limit(needed, used=used, kept=kept, to_come=to_come)

    def get(
        self, key: str, sizes: Mapping[str, int], make: Callable[[Path], None], *,
        waiting: Callable[[], None] = lambda: None,
    ) -> Entry:  # fmt: skip
        """Give an entry whose files have these sizes; where there is none, `make(folder)` fills them.

        `waiting` is called now and then while others make this entry, or others that leave no room for it.

        Raises:
            NoRoom: the budget or the disk does not hold it beside what is in use.
        """
        entry, partial = self._folder / key, self._folder / f".{key}.part"
        self._folder.mkdir(parents=True, exist_ok=True)
        if (found := _find(entry, sizes)) is not None:
            return found
        with self._locked(key, waiting):
            if (found := _find(entry, sizes)) is not None:
                return found
            try:
                while not self._reserved(entry, partial, sizes, waiting):
                    waiting()
                    time.sleep(WAIT_SECONDS)
                make(partial)
                for file in sizes:
                    sync(partial / file)  # a power cut after the rename would leave files of the right size, empty
                os.utime(partial)  # used from now on, however long it took to make
                made = Entry(entry, made=True, lock=_in_use(partial))
                partial.rename(entry)
            except OSError as error:
                if is_full(error):
                    raise NoRoom(f"the worker's disk is full: {error.strerror}") from error
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return made

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

    def _make_room(self, needed: int) -> bool:
        """Remove what nobody uses, oldest first; False where even that would not do until others have made theirs.

        Raises:
            NoRoom: nothing would do, and nothing was removed; or what was did not do, because the disk has not won it
                or others took meanwhile what was to follow.
        """
        making, unused = self._being_made(), self._unused()
        held, spare = sum(map(_size, self._folder.glob("[!.]*"))), sum(size for _, size, _ in unused)
        used = held - spare
        short = self._limit(needed, used=used, to_come=spare + making)
        if short is not None:
            raise NoRoom(short)
        if self._limit(needed, used=used + making, to_come=spare) is not None:
            return False
        for _, size, entry in unused:
            if self._limit(needed, used=held + making) is None:
                return True
            with contextlib.suppress(FileNotFoundError, BlockingIOError), _alone(entry):
                self._remove(entry)
                held -= size
        short = self._limit(needed, used=held + making)
        if short is not None:
            raise NoRoom(short)
        return True

    def _limit(self, needed: int, *, used: int, kept: int = 0, to_come: int = 0) -> str | None:
        """Say which limit leaves no room beside what is used and kept, once more of the disk is free; None: neither."""
        if used + kept + needed > self._budget:
            others = f", {amount(kept)} of it for what is read with it" if kept else ""
            others += f", {amount(used)} of it in use by running jobs" if used else ""
            return f"TUNEYARD_CACHE_BYTES allows {amount(self._budget)}{others}"
        left = shutil.disk_usage(self._folder).free + to_come - FREE_FLOOR_BYTES
        if needed > left:
            beside = f" beside {amount(used)} in use by running jobs" if used else ""
            return (
                f"the worker's disk has room for {amount(max(left, 0))}{beside} "
                f"(TUNEYARD_CACHE_BYTES would allow {amount(self._budget)})"
            )
        return None

    def _unused(self) -> list[tuple[float, int, Path]]:
        """Give what nobody uses, the oldest first: when it was used, its size, its folder. Somebody may take it yet.

        For those who have the lock of the room: two who look at once would each think that the other one uses it all.
        """
        found: list[tuple[float, int, Path]] = []
        for entry in self._folder.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, BlockingIOError), _alone(entry):
                found.append((entry.stat().st_mtime, _size(entry), entry))
        return sorted(found)

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


def _find(entry: Path, sizes: Mapping[str, int]) -> Entry | None:
    """Take an entry in use; None where it is not there, or was cut short: its map would be a fatal signal."""
    try:
        found = Entry(entry, made=False, lock=_in_use(entry))
        if not os.path.samestat(entry.stat(), os.fstat(found.lock)):  # removed between its opening and its lock
            return None
        if any((entry / file).stat().st_size != size for file, size in sizes.items()):
            return None
        os.utime(entry)
    except FileNotFoundError:
        return None
    return found


def _in_use(folder: Path) -> int:
    """Open a folder with a shared lock, which waits for the moment in which another looks what may be removed."""
    lock = _open(folder)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep everybody else from a folder for a moment.

    Raises:
        BlockingIOError: it is in use.
    """
    lock = _open(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            total += file.stat().st_size
    return total
