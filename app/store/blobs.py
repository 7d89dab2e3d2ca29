"""Bytes, addressed by their SHA-256, on local disk or on S3.

Two parties meet here: whoever stores bytes, and the sweep that removes what nothing refers to. They agree by one rule.

- A writer first upserts the row of table `blobs` (`touched_at` = now) in a transaction of its own and commits it; only
  then do the bytes get their final name. A crash in between leaves a row without bytes, which the sweep removes.
- The sweep deletes bytes inside the transaction that holds the row's lock, after it looked again at `touched_at` and at
  every foreign key. A writer of the same bytes waits for that lock, or has touched the row and is seen.

So a reader that follows a foreign key always finds the bytes. A row must be referred to within the grace period.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from sqlalchemy import ColumnElement, Engine, and_, delete, exists, select
from sqlalchemy.dialects import postgresql, sqlite

from app.domain.errors import SystemFault
from app.settings import Settings
from app.store import tables
from app.store.clock import Now
from app.store.session import transaction

CHUNK = 2**20


class MissingBlob(SystemFault):
    """Bytes that a row refers to are not in the store."""

    code = "storage_missing"


class CorruptBlob(SystemFault):
    """Bytes read back from the store are not the bytes that were stored."""

    code = "storage_corrupt"


class Place(Protocol):
    """Where bytes rest under their final name. `LocalDisk` and `ObjectStore` are the two."""

    def put(self, temporary: Path, sha256: str) -> None:
        """Give the finished, synced temporary file its final name, durably and all at once; the file may be moved."""
        ...

    def read(self, sha256: str, start: int, end: int) -> Iterator[bytes]:
        """Give the bytes from `start` to before `end`."""
        ...

    def size(self, sha256: str) -> int | None:
        """Give the number of bytes, or None where there are none."""
        ...

    def remove(self, sha256: str) -> None:
        """Delete the bytes, if they are there."""
        ...

    def path(self, sha256: str) -> Path | None:
        """Give the path of the bytes on this machine's disk, or None where they are elsewhere."""
        ...


@dataclass(frozen=True)
class Stored:
    """Bytes that are complete and synced, but visible only once they are kept."""

    sha256: str
    bytes: int
    temporary: Path


class Sink:
    """A temporary file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("xb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def finish(self) -> Stored:
        """Sync the file and say what it holds."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Stored(self._digest.hexdigest(), self._bytes, self._path)

    def abort(self) -> None:
        """Remove what was written; harmless after `finish`, and needed there too when the bytes are not kept."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class Blobs:
    """The store of bytes."""

    def __init__(self, place: Place, incoming: Path) -> None:
        """Keep bytes in `place`; `incoming` is a folder for what is still on its way in, best on the same disk."""
        self._place, self._incoming = place, incoming
        incoming.mkdir(parents=True, exist_ok=True)

    def receive(self) -> Sink:
        """Open a sink for a stream of bytes."""
        return Sink(self._incoming / secrets.token_hex(16))

    def keep(self, engine: Engine, stored: Stored) -> Stored:
        """Make received bytes visible under their digest; may be tried again when it fails.

        Commits its own transaction, by the rule above: call it before the one that refers to the bytes.
        """
        _touch(engine, stored)
        self._place.put(stored.temporary, stored.sha256)
        stored.temporary.unlink(missing_ok=True)
        return stored

    def put_file(self, engine: Engine, path: Path) -> Stored:
        """Store a finished file and read it back.

        The file is linked, not copied, where it lies on the same disk: nobody may write to it any more.

        Raises:
            CorruptBlob: what was read back differs.
        """
        stored = self._linked(path) or self._copied(path)
        try:
            self.keep(engine, stored)
        finally:
            stored.temporary.unlink(missing_ok=True)
        self.verify(stored.sha256)
        return stored

    def _linked(self, path: Path) -> Stored | None:
        temporary = self._incoming / secrets.token_hex(16)
        try:
            os.link(path, temporary)
        except OSError:  # another disk, or one without hard links
            return None
        os.utime(temporary)  # the file may be old, and the sweep goes by this time
        _sync(temporary)
        return Stored(*digest(_chunks(temporary)), temporary)

    def _copied(self, path: Path) -> Stored:
        sink = self.receive()
        try:
            for chunk in _chunks(path):
                sink.write(chunk)
            return sink.finish()
        except BaseException:
            sink.abort()
            raise

    def open(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Stream the bytes from `start` to before `end`.

        Raises:
            MissingBlob: at once, not at the first chunk.
        """
        size = self.size(sha256)
        end = size if end is None else min(end, size)
        return self._place.read(sha256, start, end) if start < end else iter(())

    def size(self, sha256: str) -> int:
        """Give the number of bytes.

        Raises:
            MissingBlob: there are none.
        """
        size = self._place.size(sha256)
        if size is None:
            raise MissingBlob(f"The stored bytes {sha256} are gone from the blob store.")
        return size

    def exists(self, sha256: str) -> bool:
        """Say whether the bytes are there."""
        return self._place.size(sha256) is not None

    def path(self, sha256: str) -> Path | None:
        """Give where the bytes lie on this machine's disk, for memory maps; None when the store is remote."""
        return self._place.path(sha256)

    def verify(self, sha256: str) -> None:
        """Read the bytes back.

        Raises:
            CorruptBlob: they are not the bytes of this digest.
        """
        found, _ = digest(self.open(sha256))
        if found != sha256:
            raise CorruptBlob(f"The stored bytes {sha256} read back as {found}.")

    def fetch(self, sha256: str, to: Path) -> None:
        """Bring verified bytes to a local path, all at once; linked where they lie on the same disk, so read only.

        Raises:
            MissingBlob, CorruptBlob: nothing appears under the path.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{to.name}.{secrets.token_hex(8)}")
        try:
            if not self._link(sha256, temporary):
                with temporary.open("xb") as file:
                    for chunk in self.open(sha256):
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
            found, _ = digest(_chunks(temporary))
            if found != sha256:
                raise CorruptBlob(f"The stored bytes {sha256} read back as {found}.")
            os.replace(temporary, to)
        finally:
            # Renaming one link over another of the same file does nothing, so the temporary name may still be there.
            temporary.unlink(missing_ok=True)

    def delete(self, sha256: str) -> None:
        """Delete the bytes without asking anybody; only `sweep` knows when that is right."""
        self._place.remove(sha256)

    def sweep(self, engine: Engine, grace_seconds: float, *, limit: int = 1000) -> int:
        """Remove bytes that nothing has referred to for `grace_seconds`; safe in many processes at once.

        Returns the number of blobs removed. The grace must be longer than the time between keeping bytes and
        committing the row that refers to them.
        """
        with transaction(engine, read_only=True) as session:
            old = session.scalars(select(tables.Blob.sha256).where(_unused(grace_seconds)).limit(limit)).all()
        removed = 0
        for sha256 in old:
            with transaction(engine) as session:
                locked = session.scalar(
                    select(tables.Blob.sha256)
                    .where(tables.Blob.sha256 == sha256, _unused(grace_seconds))
                    .with_for_update(skip_locked=True)
                )
                if locked is None:
                    continue
                self._place.remove(sha256)
                session.execute(delete(tables.Blob).where(tables.Blob.sha256 == sha256))
                removed += 1
        self._sweep_incoming(grace_seconds)
        return removed

    def _sweep_incoming(self, grace_seconds: float) -> None:
        before = time.time() - max(grace_seconds, 3600)  # an upload that still flows changes its file's time
        for path in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def _link(self, sha256: str, temporary: Path) -> bool:
        here = self._place.path(sha256)
        if here is None:
            return False
        if not here.exists():
            raise MissingBlob(f"The stored bytes {sha256} are gone from the blob store.")
        try:
            os.link(here, temporary)
        except OSError:
            return False
        return True


def open_blobs(settings: Settings) -> Blobs:
    """Open the store that the settings name."""
    home = settings.home_path
    if settings.blobs is None:
        from app.store.local_disk import LocalDisk

        return Blobs(LocalDisk(home / "blobs"), home / "blobs" / "incoming")
    from app.store.object_store import open_object_store

    return Blobs(open_object_store(settings), home / "incoming")


def digest(chunks: Iterator[bytes]) -> tuple[str, int]:
    """Give the SHA-256 and the number of bytes of a stream."""
    total, state = 0, hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
        total += len(chunk)
    return state.hexdigest(), total


def _touch(engine: Engine, stored: Stored) -> None:
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    row = insert(tables.Blob).values(sha256=stored.sha256, bytes=stored.bytes, touched_at=Now())
    with transaction(engine) as session:
        session.execute(row.on_conflict_do_update(index_elements=["sha256"], set_={"touched_at": Now()}))


def _unused(grace_seconds: float) -> ColumnElement[bool]:
    """Old, and no foreign key of any table points at it: a table added later is covered by itself."""
    references = [
        exists().where(foreign_key.parent == tables.Blob.sha256)
        for table in tables.Base.metadata.sorted_tables
        for foreign_key in table.foreign_keys
        if foreign_key.column is tables.Blob.__table__.c.sha256
    ]
    return and_(tables.Blob.touched_at < Now() - grace_seconds, *(~reference for reference in references))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
