"""Blobs on this machine's disk: `<root>/<first two digits>/<sha256>`, each write synced before and after its rename."""

import os
from collections.abc import Iterator
from pathlib import Path

CHUNK = 2**20


class LocalDisk:
    """A folder. Bytes are synced before they get their name, and the folder after it: a power cut loses neither."""

    def __init__(self, root: Path) -> None:
        """Keep the bytes below `root`."""
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, temporary: Path, sha256: str) -> None:
        """Rename the temporary file; one that is already there is replaced, which also heals a damaged one."""
        final = self._final(sha256)
        if not final.parent.exists():
            final.parent.mkdir(exist_ok=True)
            _sync_folder(self._root)
        temporary.chmod(0o444)  # caches link to this very file: nobody may write to it by mistake
        os.replace(temporary, final)
        _sync_folder(final.parent)

    def read(self, sha256: str, start: int, end: int) -> Iterator[bytes]:
        """Read with `pread`, one chunk at a time."""
        descriptor = os.open(self._final(sha256), os.O_RDONLY)
        try:
            while start < end and (chunk := os.pread(descriptor, min(CHUNK, end - start), start)):
                yield chunk
                start += len(chunk)
        finally:
            os.close(descriptor)

    def size(self, sha256: str) -> int | None:
        """Ask the file system."""
        try:
            return self._final(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, sha256: str) -> None:
        """Unlink; who has the file open reads on."""
        self._final(sha256).unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Give the file itself."""
        return self._final(sha256)

    def _final(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
