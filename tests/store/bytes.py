"""Bytes in a store, as tests put them there, look at them and let them grow old."""

from pathlib import Path

from sqlalchemy import Engine, update

from app.store import tables
from app.store.blobs import Blobs, Place, Stored
from app.store.session import transaction
from tests.factories import make_project


class Crash(Exception):
    """The process ends here."""


def place_of(store: Blobs) -> Place:
    """Give where a store keeps its bytes."""
    return store._place  # pyright: ignore[reportPrivateUsage]


def incoming(store: Blobs) -> list[Path]:
    """List the files that are not whole yet."""
    return list(store._incoming.iterdir())  # pyright: ignore[reportPrivateUsage]


def keep(engine: Engine, store: Blobs, data: bytes) -> Stored:
    """Store bytes as they come in pieces."""
    sink = store.receive()
    for start in range(0, len(data), 1000):
        sink.write(data[start : start + 1000])
    try:
        return store.keep(engine, sink.finish())
    finally:
        sink._file.close()  # pyright: ignore[reportPrivateUsage]  # as the end of a process does


def row(engine: Engine, sha256: str) -> tables.Blob | None:
    """Read the row of a blob."""
    with transaction(engine, read_only=True) as session:
        return session.get(tables.Blob, sha256)


def age(engine: Engine, sha256: str) -> None:
    """Let its grace be over."""
    with transaction(engine) as session:
        session.execute(update(tables.Blob).where(tables.Blob.sha256 == sha256).values(touched_at=1.0))


def refer(engine: Engine, stored: Stored) -> None:
    """Refer to it from an upload."""
    with transaction(engine) as session:
        project = make_project(session)
        session.add(
            tables.Upload(id=f"upl_{project.id}", project_id=project.id, bytes=stored.bytes, sha256=stored.sha256)
        )
