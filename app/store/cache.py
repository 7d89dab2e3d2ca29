"""Local copies of blobs, for whoever needs a file: a memory map, a trainer. Least recently used goes first."""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from app.store.blobs import Blobs

ABANDONED_SECONDS = 24 * 3600.0


def bring(blobs: Blobs, folder: Path, sha256: str, *, again: bool = False) -> Path:
    """Give a verified local copy, linked where the store is on this disk; a file appears only after its hash was taken.

    With `again` the hash of a copy that is here already is taken once more, and a damaged one is fetched anew.

    Raises:
        MissingBlob, CorruptBlob: there is none, or not the right one.
    """
    path = folder / sha256
    try:
        os.utime(path)
        if again and _digest(path) != sha256:
            path.unlink()
            raise FileNotFoundError(path)
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        blobs.fetch(sha256, path)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trim(blobs: Blobs, folder: Path, budget: int) -> None:
    """Keep the copies within `budget` bytes; who has one open reads on.

    Beside a store on this machine's disk a copy is a link, where links can be made, and costs nothing while the store
    has the file; what the store has let go goes here too.
    """
    kept: list[tuple[float, int, Path]] = []
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            status, stored = path.stat(), blobs.path(path.name)
            if path.name.startswith("."):  # on its way in, or of a process that was killed
                if status.st_mtime < time.time() - ABANDONED_SECONDS:
                    path.unlink()
            elif stored is not None and not stored.exists():
                path.unlink()
            else:
                kept.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= budget:
            break
        path.unlink(missing_ok=True)
        total -= size
