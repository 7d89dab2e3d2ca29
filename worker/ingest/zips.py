"""Zip archives, read by their central directory with our own strict reader (docs/decisions/0006).

Every number in a zip stands twice, and attacks live in the difference. Here the central directory must end exactly
where the end record begins, no two entries may share a byte, the local header must say the same as the central one,
and a stream may give exactly the announced number of bytes, with the announced checksum.
"""

import os
import stat
import struct
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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

_END, _END64, _LOCATOR = struct.Struct("<IHHHHIIH"), struct.Struct("<IQHHIIQQQQ"), struct.Struct("<IIQI")
_CENTRAL, _LOCAL = struct.Struct("<IHHHHHHIIIHHHHHII"), struct.Struct("<IHHHHHIIIHH")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_DESCRIPTOR = 0x8
_FULL, _FULL16 = 0xFFFFFFFF, 0xFFFF


class Zip:
    """A zip file whose entries are checked; see `archive.Archive`."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._length = os.fstat(self._file).st_size
        self.names: list[str] = []
        self.sizes: array[int] = array("q")
        self.refused: list[Problem] = []
        self.warnings: list[str] = []
        self._offsets, self._packed, self._ends = array("q"), array("q"), array("q")
        self._checksums, self._raw_names = array("I"), array("q")
        self._deflated = bytearray()
        self._links: list[tuple[str, int, int, int]] = []  # name, offset, packed bytes, method
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def read(self, numbers: Sequence[int]) -> list[Bytes | Refused]:
        """Read whole entries; neighbours in the file come with one system call."""
        if not numbers:
            return []
        low, high = min(self._offsets[n] for n in numbers), max(self._ends[n] for n in numbers)
        if high - low <= SPAN + 2 * sum(self._packed[n] for n in numbers) and len(numbers) > 1:
            span = memoryview(os.pread(self._file, high - low, low))
            return [self._entry(n, span[self._offsets[n] - low : self._ends[n] - low]) for n in numbers]
        return [self._entry(n, memoryview(self._raw(n, self._ends[n] - self._offsets[n]))) for n in numbers]

    def head(self, number: int, count: int) -> bytes:
        """Give an entry's first bytes."""
        raw = memoryview(self._raw(number, min(self._ends[number] - self._offsets[number], 2 * 65536 + 4096 + count)))
        data = self._data(number, raw, partial=True)
        if not self._deflated[number]:
            return bytes(data[:count])
        try:
            return zlib.decompressobj(-15).decompress(data, count)
        except zlib.error:
            return b""

    def unpack(self, number: int, to: Path) -> None:
        """Write one entry to a path of ours."""
        size, done, checksum, name = self.sizes[number], 0, 0, self.names[number]
        start = self._offsets[number] + self._skip(number, self._raw(number, 30 + 2 * 65536))
        end = start + self._packed[number]
        unpacker = zlib.decompressobj(-15) if self._deflated[number] else None
        with open(to, "xb") as file:
            while start < end or (unpacker and unpacker.unconsumed_tail):
                piece = unpacker.unconsumed_tail if unpacker else b""
                if not piece:
                    piece = os.pread(self._file, min(2**20, end - start), start)
                    start += len(piece)
                try:
                    data = unpacker.decompress(piece, 2**20) if unpacker else piece
                except zlib.error:
                    raise damaged(f"{shown(name)} in the zip is damaged") from None
                done += len(data)
                if done > size:
                    raise hostile(f"{shown(name)} unpacks to more than the {size} bytes it announces")
                checksum = zlib.crc32(data, checksum)
                file.write(data)
        if done != size or checksum != self._checksums[number]:
            raise damaged(f"{shown(name)} in the zip is damaged")

    def _raw(self, number: int, count: int) -> bytes:
        return os.pread(self._file, count, self._offsets[number])

    def _skip(self, number: int, raw: Bytes) -> int:
        """Check a local header against the central one and give the place of the data behind it."""
        name = shown(self.names[number])
        if len(raw) < 30:
            raise damaged(f"{name} in the zip is cut short")
        signature, _, flags, method, _, _, checksum, packed, size, name_length, extra = _LOCAL.unpack_from(raw)
        start = 30 + name_length + extra
        if signature != 0x04034B50 or self._offsets[number] + start + self._packed[number] > self._ends[number]:
            raise hostile(f"{name} shares bytes with another entry of the zip")
        if hash(bytes(raw[30 : 30 + name_length])) != self._raw_names[number]:
            raise hostile(f"{name} has another name in its own header than in the zip's directory")
        if flags & _ENCRYPTED or (method == _DEFLATED) != bool(self._deflated[number]):
            raise hostile(f"{name} is packed in another way than the zip's directory says")
        if not flags & _DESCRIPTOR and _FULL not in (packed, size):
            announced = (self._checksums[number], self._packed[number], self.sizes[number])
            if (checksum, packed, size) != announced:
                raise hostile(f"{name} announces another size in its own header than in the zip's directory")
        return start

    def _data(self, number: int, raw: memoryview, *, partial: bool = False) -> memoryview:
        start = self._skip(number, raw)
        data = raw[start : start + self._packed[number]]
        if len(data) != self._packed[number] and not partial:
            raise damaged(f"{shown(self.names[number])} in the zip is cut short")
        return data

    def _entry(self, number: int, raw: memoryview) -> Bytes | Refused:
        data: Bytes = self._data(number, raw)
        size = self.sizes[number]
        if self._deflated[number]:
            unpacker = zlib.decompressobj(-15)
            try:
                data = unpacker.decompress(data, size + 1)
            except zlib.error:
                return Refused("damaged in the zip; pack it again")
            if len(data) > size:
                raise hostile(f"{shown(self.names[number])} unpacks to more than the {size} bytes it announces")
            if len(data) < size or not unpacker.eof:
                return Refused(f"damaged in the zip: {size} bytes are announced, {len(data)} are there")
        if zlib.crc32(data) != self._checksums[number]:
            return Refused("damaged in the zip: its checksum is wrong")
        return data

    def _index(self) -> None:
        start, size, count = self._directory()
        if count > self._limits.max_entries:
            raise hostile(
                f"the zip holds {count} entries; {self._limits.max_entries} are allowed", "raise TUNEYARD_MAX_ENTRIES"
            )
        self._check_overlap(start, self._entries(start, size, count))
        for link in self._links:
            self._check_link(*link)
        total = sum(self.sizes)
        if total > self._limits.max_unpacked_bytes:
            raise hostile(
                f"the zip unpacks to {total} bytes; {self._limits.max_unpacked_bytes} are allowed",
                "raise TUNEYARD_MAX_UNPACKED_BYTES",
            )
        if total > max(FLOOR, self._length * self._limits.max_ratio):
            raise hostile(f"the zip unpacks to {total // max(self._length, 1)} times its size; this looks like a bomb")
        for number in reversed(list(doubles(self.names))):
            self.refused.append(Problem(shown(self.names[number]), "its name occurs twice; letter case does not count"))
            self._drop(number)

    def _check_link(self, name: str, offset: int, packed: int, method: int) -> None:
        raw = os.pread(self._file, 30 + 2 * 65536 + 8192, offset)
        data = raw[30 + int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little") :][:packed]
        try:
            target = zlib.decompressobj(-15).decompress(data, 4096) if method == _DEFLATED else data[:4096]
        except zlib.error:
            target = b""
        refuse_link(name, target.decode(errors="replace"))

    def _drop(self, number: int) -> None:
        for column in (self.names, self.sizes, self._offsets, self._packed, self._ends, self._checksums):
            del column[number]
        del self._raw_names[number], self._deflated[number]

    def _directory(self) -> tuple[int, int, int]:
        """Find the central directory: its place, size and number of entries."""
        low = max(0, self._length - 65535 - _END.size)
        tail = os.pread(self._file, self._length - low, low)
        at = tail.rfind(b"PK\5\6")
        while at >= 0 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
            at = tail.rfind(b"PK\5\6", 0, at)
        if at < 0:
            raise damaged("the zip is cut short: its directory is missing")
        _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, at)
        end = low + at
        locator = os.pread(self._file, _LOCATOR.size, end - _LOCATOR.size) if end >= _LOCATOR.size else b""
        if locator[:4] == b"PK\6\7":
            _, _, at64, _ = _LOCATOR.unpack(locator)
            record = os.pread(self._file, _END64.size, at64) if at64 < end else b""
            if len(record) < _END64.size or record[:4] != b"PK\6\6":
                raise damaged("the zip's directory is damaged")
            _, _, _, _, disk, first_disk, here, count, size, start = _END64.unpack(record)
            end = at64
        if disk or first_disk or here != count:
            raise damaged("the zip is one part of several", "join the parts into one zip")
        if start + size != end:
            raise damaged("the zip's directory is not where its end says: something was put before or cut out")
        return start, size, count

    def _entries(self, start: int, size: int, count: int) -> np.ndarray:
        """Read the central directory; gives `[entries, 2]`: where each begins, and the least it must hold."""
        regions = array("q")
        buffer, at, read, seen = b"", 0, 0, 0
        while seen < count:
            if len(buffer) - at < 46 + 3 * 65535 and read < size:
                piece = os.pread(self._file, min(2**20, size - read), start + read)
                if not piece:
                    break
                buffer, at, read = buffer[at:] + piece, 0, read + len(piece)
            if len(buffer) - at < 46 or buffer[at : at + 4] != b"PK\1\2":
                break
            fields = _CENTRAL.unpack_from(buffer, at)
            after = at + 46 + fields[10] + fields[11] + fields[12]
            if after > len(buffer):
                break
            raw = buffer[at + 46 : at + 46 + fields[10]]
            self._add(fields, raw, buffer[at + 46 + fields[10] : at + 46 + fields[10] + fields[11]], regions)
            at, seen = after, seen + 1
        if seen < count or read - (len(buffer) - at) != size:
            raise damaged("the zip's directory is damaged")
        return np.frombuffer(regions, np.int64).reshape(-1, 2) if count else np.empty((0, 2), np.int64)

    def _add(self, fields: tuple[int, ...], raw: bytes, extra: bytes, regions: "array[int]") -> None:
        _, made_by, _, flags, method, _, _, checksum, packed, size, _, _, _, disk, _, attributes, offset = fields
        text = _text(raw, flags)
        if _FULL in (packed, size, offset) or disk == _FULL16:
            size, packed, offset = _zip64(extra, size, packed, offset, shown(text))
        regions.append(offset)
        regions.append(30 + len(raw) + packed)
        if text.endswith("/"):
            place(text[:-1])
            return
        name, reason = place(text), None
        mode = attributes >> 16 if made_by >> 8 in (3, 19) else 0
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            reason = _special(text, mode)
            if stat.S_ISLNK(mode):
                self._links.append((text, offset, packed, method))
        elif isinstance(name, Refused):
            reason = name.reason
        elif flags & _ENCRYPTED:
            reason = "encrypted; pack it without a password"
        elif method not in (_STORED, _DEFLATED):
            reason = f"packed by method {method}; pack it with deflate"
        elif size > self._limits.max_entry_bytes:
            reason = f"{size} bytes; a file may have {self._limits.max_entry_bytes}"
        elif method == _STORED and size != packed:
            raise hostile(f"{shown(text)} announces {size} bytes and holds {packed}")
        elif size > max(FLOOR, packed * self._limits.max_ratio):
            raise hostile(f"{shown(text)} unpacks to {size // max(packed, 1)} times its size; this looks like a bomb")
        if reason:
            self.refused.append(Problem(shown(text), reason))
            return
        assert isinstance(name, str)
        self.names.append(name)
        self.sizes.append(size)
        self._offsets.append(offset)
        self._packed.append(packed)
        self._checksums.append(checksum)
        self._raw_names.append(hash(raw))
        self._deflated.append(method == _DEFLATED)

    def _check_overlap(self, directory: int, regions: np.ndarray) -> None:
        """Refuse entries that share bytes (CVE-2024-0450), and note where each must end at the latest."""
        starts = np.sort(regions[:, 0])
        order = np.argsort(regions[:, 0], kind="stable")
        limits = np.append(starts[1:], directory)
        if (regions[order, 0] + regions[order, 1] > limits).any() or (starts < 0).any():
            raise hostile("entries of the zip share bytes; this looks like a bomb")
        if len(self._offsets):
            ends = limits[np.searchsorted(starts, np.frombuffer(self._offsets, np.int64))]
            self._ends.frombytes(ends.astype(np.int64).tobytes())


def _text(raw: bytes, flags: int) -> str:
    """Decode a name: UTF-8 where it says so or is so, else the code page of the format's standard."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape") if flags & 0x800 else raw.decode("cp437")


def _zip64(extra: bytes, size: int, packed: int, offset: int, name: str) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = [struct.unpack_from("<Q", extra, p)[0] for p in range(at + 4, at + 4 + length - length % 8, 8)
                      if p + 8 <= len(extra)]  # fmt: skip
            try:
                size = values.pop(0) if size == _FULL else size
                packed = values.pop(0) if packed == _FULL else packed
                offset = values.pop(0) if offset == _FULL else offset
            except IndexError:
                raise damaged(f"the sizes of {name} in the zip's directory are damaged") from None
        at += 4 + length
    if max(size, packed, offset) >= 2**62:
        raise hostile(f"{name} announces an impossible size")
    return size, packed, offset


def _special(name: str, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return LINK
    if stat.S_ISDIR(mode):
        return "a folder that pretends to be a file"
    raise special(name)
