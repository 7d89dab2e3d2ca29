"""Tar archives, plain or gzipped, read with our own strict reader (docs/decisions/0006).

A gzipped one is first unpacked to a plain tar in scratch, counted as it grows, so that entries can be read in any
order. Headers: ustar, old v7, GNU long names, pax paths and sizes.
"""

import gzip
import os
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from worker.ingest.archive import (
    FLOOR,
    LINK,
    SPAN,
    Bytes,
    Problem,
    Refused,
    damaged,
    doubles,
    hostile,
    place,
    refuse_link,
    shown,
    special,
)
from worker.report import Limits

BLOCK = 512
_MAX_HEADER = 2**20  # of one long name or one set of pax records


def is_header(block: bytes) -> bool:
    """Tell whether this block begins a tar file: its checksum is right."""
    if len(block) < BLOCK or not block.strip(b"\0"):
        return False
    digits = block[148:156].strip(b"\0 ")
    if not digits or digits.strip(b"01234567"):
        return False
    return int(digits, 8) == sum(block[:148]) + 8 * 32 + sum(block[156:BLOCK])


def gunzip(source: Path, to: Path, limits: Limits, tick: Callable[[float], None]) -> None:
    """Unpack a gzip file, within the limits on ratio and size; `tick` hears the fraction done. Raises `DataFault`."""
    packed_size, done = source.stat().st_size, 0
    with open(source, "rb") as packed, gzip.GzipFile(fileobj=packed) as stream, open(to, "xb") as file:
        while True:
            try:
                piece = stream.read(2**20)
            except EOFError:
                raise damaged("the gzip file is cut short") from None
            except (zlib.error, gzip.BadGzipFile):
                raise damaged("the gzip file is damaged") from None
            if not piece:
                return
            done += len(piece)
            if done > limits.max_unpacked_bytes:
                raise hostile(
                    f"the gzip file unpacks to more than {limits.max_unpacked_bytes} bytes",
                    "raise TUNEYARD_MAX_UNPACKED_BYTES",
                )
            if done > max(FLOOR, packed_size * limits.max_ratio):
                raise hostile(f"the gzip file unpacks to over {limits.max_ratio} times its size; it looks like a bomb")
            file.write(piece)
            tick(min(1.0, packed.tell() / max(packed_size, 1)))


class Tar:
    """A plain tar file whose entries are checked; see `archive.Archive`."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._file = open(path, "rb")  # noqa: SIM115  (closed by close)
        self._length = os.fstat(self._file.fileno()).st_size
        self.names: list[str] = []
        self.sizes: array[int] = array("q")
        self.refused: list[Problem] = []
        self.warnings: list[str] = []
        self._offsets: array[int] = array("q")
        try:
            self._index(self._file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, numbers: Sequence[int]) -> list[Bytes | Refused]:
        """Read whole entries; neighbours in the file come with one system call."""
        if not numbers:
            return []
        low = min(self._offsets[n] for n in numbers)
        high = max(self._offsets[n] + self.sizes[n] for n in numbers)
        if len(numbers) > 1 and high - low <= SPAN + 2 * sum(self.sizes[n] for n in numbers):
            span = memoryview(os.pread(self._file.fileno(), high - low, low))
            return [span[self._offsets[n] - low : self._offsets[n] - low + self.sizes[n]] for n in numbers]
        return [os.pread(self._file.fileno(), self.sizes[n], self._offsets[n]) for n in numbers]

    def head(self, number: int, count: int) -> bytes:
        """Give an entry's first bytes."""
        return os.pread(self._file.fileno(), min(count, self.sizes[number]), self._offsets[number])

    def unpack(self, number: int, to: Path) -> None:
        """Write one entry to a path of ours."""
        at, end = self._offsets[number], self._offsets[number] + self.sizes[number]
        with open(to, "xb") as file:
            while at < end:
                piece = os.pread(self._file.fileno(), min(2**20, end - at), at)
                file.write(piece)
                at += len(piece)

    def _index(self, file: BinaryIO) -> None:
        """Walk over the headers, up to the block of zeros that ends the archive."""
        extra: dict[str, str] = {}
        entries = 0
        while True:
            at = file.tell()
            block = file.read(BLOCK)
            if not block.strip(b"\0"):
                if len(block) < BLOCK:
                    self.warnings.append("the tar has no end mark; it may have been cut short")
                break
            if not is_header(block):
                raise damaged(f"the tar is damaged or cut short at byte {at}, after {len(self.names)} files")
            entries += 1
            if entries > self._limits.max_entries:
                raise hostile(
                    f"the tar holds more than {self._limits.max_entries} entries", "raise TUNEYARD_MAX_ENTRIES"
                )
            kind, size = block[156:157], _number(block[124:136])
            if kind in (b"x", b"L", b"K", b"g"):
                extra |= self._extension(file, kind, size)
                continue
            more = kind == b"S" and block[482]
            while more:  # the map of a sparse file goes on behind its header
                more = file.read(BLOCK)[504:505].strip(b"\0")
            size = int(extra["size"]) if extra.get("size", "").isdecimal() else size
            self._add(extra.get("path") or _name(block), kind or b"0", size, block, extra)
            extra = {}
            file.seek(size + -size % BLOCK, os.SEEK_CUR)
        if extra:
            raise damaged("the tar ends behind the header of a long name")
        for number in reversed(list(doubles(self.names))):
            self.refused.append(Problem(shown(self.names[number]), "its name occurs twice; letter case does not count"))
            del self.names[number], self.sizes[number], self._offsets[number]

    def _extension(self, file: BinaryIO, kind: bytes, size: int) -> dict[str, str]:
        if size > _MAX_HEADER:
            raise hostile(f"the tar holds a header of {size} bytes")
        data = file.read(size + -size % BLOCK)[:size]
        if len(data) < size:
            raise damaged("the tar is cut short in a header")
        if kind == b"K":
            return {"linkpath": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        if kind == b"L":
            return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        records = _records(data)
        if kind == b"g":
            if records.keys() & {"path", "size", "linkpath"}:
                raise hostile("the tar names or sizes all its files by one global header")
            return {}
        return records

    def _add(self, text: str, kind: bytes, size: int, block: bytes, extra: dict[str, str]) -> None:
        offset = self._file.tell()
        if kind == b"5" or (kind == b"\0" and text.endswith("/")):
            place(text.rstrip("/") or ".")
            return
        if kind in (b"3", b"4", b"6"):
            raise special(text)
        name = place(text)
        reason = name.reason if isinstance(name, Refused) else None
        if kind in (b"1", b"2"):
            refuse_link(text, extra.get("linkpath") or _text(block[157:257]))
            reason = LINK
        elif kind == b"S" or any(key.startswith("GNU.sparse") for key in extra):
            reason = "a sparse file; pack it with its holes"
        elif kind not in (b"0", b"\0", b"7"):
            reason = f"an entry of the unknown kind {kind!r}"
        elif offset + size > self._length:
            raise damaged(f"the tar is cut short: {shown(text)} announces {size} bytes")
        elif size > self._limits.max_entry_bytes:
            reason = f"{size} bytes; a file may have {self._limits.max_entry_bytes}"
        if reason:
            self.refused.append(Problem(shown(text), reason))
            return
        assert isinstance(name, str)
        self.names.append(name)
        self.sizes.append(size)
        self._offsets.append(offset)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if field[0] & 0x80 or digits.strip(b"01234567"):
        raise hostile("the tar announces an impossible size")
    return int(digits or b"0", 8)


def _records(data: bytes) -> dict[str, str]:
    """Read pax records: `length key=value\\n`, again and again."""
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 9 else 0
        key, mark, value = rest[: size - len(length) - 1].partition(b"=")
        if not mark or not value.endswith(b"\n") or size > len(data):
            raise damaged("the tar holds a damaged pax header")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[size:]
    return records
