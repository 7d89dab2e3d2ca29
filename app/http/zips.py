"""A zip file made while it is sent: constant memory, nothing on disk."""

import io
import time
import zipfile
from collections.abc import Iterable, Iterator

Entry = tuple[str, int, Iterator[bytes]]  # name, bytes, content


class _Outlet(io.RawIOBase):
    """A file that cannot seek; what is written to it is taken out again piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        piece = bytes(memoryview(data))  # pyright: ignore[reportArgumentType]
        self._pieces.append(piece)
        return len(piece)

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken


def stream(entries: Iterable[Entry], *, made_at: float) -> Iterator[bytes]:
    """Zip the entries, in order; stored, because weights do not compress. The same entries give the same bytes.

    A reader whose entry breaks off gets no central directory, so it cannot mistake the rest for a whole zip.
    """
    outlet = _Outlet()
    archive = zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED)
    for name, size, content in entries:
        info = zipfile.ZipInfo(name, date_time=time.gmtime(max(made_at, 315_532_800.0))[:6])  # zip begins in 1980
        info.external_attr = 0o644 << 16
        with archive.open(info, "w", force_zip64=size >= 2**31) as entry:
            for chunk in content:
                entry.write(chunk)
                yield outlet.take()
    archive.close()
    yield outlet.take()
