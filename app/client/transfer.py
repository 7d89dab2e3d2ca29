"""Bytes over a connection: uploads that report how far they are, downloads that go on where they were cut off."""

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from app.client.connection import LOST, Connection, Patience
from app.client.errors import Damaged, Misplaced
from app.client.objects import File

Advance = Callable[[int, int], None]  # (bytes so far, bytes in all)


class Counted:
    """A file that tells how much of it was read; rewinding, as a repeat does, starts the count again."""

    def __init__(self, file: IO[bytes], advance: Advance | None) -> None:
        self._file, self._advance = file, advance
        self._total = os.fstat(file.fileno()).st_size

    def fileno(self) -> int:
        """Let httpx find the length."""
        return self._file.fileno()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and report the new place."""
        return self._told(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Give the place."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """Read on, and report the new place."""
        piece = self._file.read(size)
        self._told(self._file.tell())
        return piece

    def _told(self, place: int) -> int:
        if self._advance:
            self._advance(place, self._total)
        return place


def post_file(
    connection: Connection, path: str, file: Path, fields: dict[str, Any], *, advance: Advance | None = None
) -> Any:
    """POST a file as multipart, streamed from disk, and give the JSON answer; a folder travels as one tar."""
    with _as_file(file) as (name, opened):
        parts = {"file": (name, Counted(opened, advance), "application/octet-stream")}
        # Generous: the server answers only after the last byte is hashed and synced.
        return connection.send("POST", path, data=fields, files=parts, timeout=600).json()


@contextmanager
def _as_file(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if path.is_dir():
        # Images are compressed already; order and owners are fixed, so the same folder always has the same digest.
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for member in sorted(item for item in path.rglob("*") if item.is_file()):
                    archive.add(member, str(member.relative_to(path)), recursive=False, filter=_anonymous)
            packed.seek(0)
            yield f"{path.resolve().name}.tar", packed
    elif path.is_file():
        with path.open("rb") as opened:
            yield path.name, opened
    else:
        raise Misplaced(f"There is no file or folder {path}.")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def fetch_file(connection: Connection, path: str, file: File, folder: Path, *, advance: Advance | None = None) -> Path:
    """Download `file` into `folder` and verify it; goes on from `NAME.part` if an earlier call was cut off.

    Raises:
        Damaged: the bytes that came do not have the promised digest; the part is removed.
    """
    name = file["name"]
    if not name or name != Path(name).name or name in {".", ".."}:
        raise Damaged(f"The server offers a file with the impossible name {name!r}.")
    whole, part = folder / name, folder / f"{name}.part"
    if whole.is_file() and whole.stat().st_size == file["bytes"] and digest(whole) == file["sha256"]:
        if advance:
            advance(file["bytes"], file["bytes"])
        return whole
    folder.mkdir(parents=True, exist_ok=True)
    _fill(connection, path, part, file["bytes"], advance)
    if (got := digest(part)) != file["sha256"]:
        part.unlink()
        raise Damaged(f"{name} has SHA-256 {got}, not {file['sha256']} as promised; it was removed. Try again.")
    part.replace(whole)
    return whole


def _fill(connection: Connection, path: str, part: Path, total: int, advance: Advance | None) -> None:
    """Bring `part` to its full length, over as many connections as it takes."""
    patience = Patience(connection)
    with part.open("ab") as out:
        while (have := out.tell()) < total:
            ranged = {"Range": f"bytes={have}-"} if have else {}
            try:
                with connection.stream(path, headers=ranged) as response:
                    if have and response.status_code != 206:
                        have = 0
                        out.truncate(0)
                        out.seek(0)
                    # Without a size: gathering pieces would lose what came before a cut.
                    for piece in response.iter_raw():
                        out.write(piece)
                        have += len(piece)
                        patience.renew()
                        if advance:
                            advance(have, total)
            except LOST as error:
                out.flush()
                patience.wait(error)
        out.truncate(max(total, 0))


def digest(path: Path) -> str:
    """Give the SHA-256 of a file, in hexadecimal."""
    with contextlib.closing(path.open("rb")) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
