"""Tiny real images, archives of them, and archives that no honest program writes."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from worker.report import Limits

LIMITS = Limits(
    max_entries=1000, max_entry_bytes=4 * 2**20, max_unpacked_bytes=16 * 2**20, max_ratio=100, max_pixels=1_000_000
)


def image(seed: int = 0, width: int = 12, height: int = 10, mode: str = "RGB") -> Image.Image:
    """Make a picture that is another one for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Encode a picture."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(seed: int = 0, width: int = 12, height: int = 10) -> bytes:
    """Encode the picture of that seed as JPEG."""
    return encoded(image(seed, width, height))


def png(seed: int = 0, width: int = 12, height: int = 10, mode: str = "RGB") -> bytes:
    """Encode the picture of that seed as PNG."""
    return encoded(image(seed, width, height, mode), "PNG")


def crashing_png() -> bytes:
    """A PNG with a wrong checksum within: it takes torchvision 0.29's decoder down with its process."""
    whole = bytearray(png(3, 40, 40))
    whole[100] ^= 1
    return bytes(whole)


def huge_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG whose header promises far more than it holds."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 999)), (b"IEND", b""))
    )


def some(*names: str) -> dict[str, bytes]:
    """Give a different JPEG for every name."""
    return {name: jpeg(number) for number, name in enumerate(names)}


def zipped(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write an honest zip."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data, method)
    return path


def tarred(path: Path, files: Mapping[str, bytes], mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write an honest tar; `mode` is `w` or `w:gz`."""
    with tarfile.open(path, mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def foldered(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files into a folder."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def tar_entry(name: str, data: bytes = b"", kind: bytes = b"0", link: str = "", **fields: bytes) -> bytes:
    """Write one tar entry, with any field set to raw bytes: `size`, `magic`, `name`."""
    block = bytearray(512)
    block[:100] = fields.get("name", name.encode()).ljust(100, b"\0")
    block[100:108], block[108:124] = b"0000644\0", b"0000000\x000000000\0"
    block[124:136] = fields.get("size", b"%011o\0" % len(data)).ljust(12, b"\0")
    block[136:148], block[148:156] = b"00000000000\0", b" " * 8
    block[156:157] = kind
    block[157:257] = link.encode().ljust(100, b"\0")
    block[257:265] = fields.get("magic", b"ustar\x0000")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + b"\0" * (-len(data) % 512)


def raw_tar(path: Path, *entries: bytes, end: bytes = b"\0" * 1024) -> Path:
    """Write entries as they are."""
    path.write_bytes(b"".join(entries) + end)
    return path


@dataclass
class Entry:
    """An entry of a zip, every field of which may lie, in either of its two places."""

    name: bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    size: int | None = None
    local_name: bytes | None = None
    local_size: int | None = None
    local_method: int | None = None
    packed: int | None = None
    offset: int | None = None
    checksum: int | None = None
    mode: int = 0o100644
    extra: bytes = b""
    real: bytes = field(init=False, default=b"")

    def __post_init__(self) -> None:
        self.real = self.data
        if self.method == 8:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            self.real = packer.compress(self.data) + packer.flush()


def raw_zip(path: Path, entries: Sequence[Entry], **end: int) -> Path:
    """Write a zip exactly as told; `end` may set `count`, `size` or `start` of the directory, or `disk`."""
    out, directory = bytearray(), bytearray()
    for entry in entries:
        at = len(out)
        checksum = zlib.crc32(entry.data) if entry.checksum is None else entry.checksum
        size = len(entry.data) if entry.size is None else entry.size
        packed = len(entry.real) if entry.packed is None else entry.packed
        local_name = entry.name if entry.local_name is None else entry.local_name
        local_size = size if entry.local_size is None else entry.local_size
        local_method = entry.method if entry.local_method is None else entry.local_method
        if entry.offset is None:
            out += struct.pack(
                "<IHHHHHIIIHH", 0x04034B50, 20, entry.flags, local_method, 0, 33, checksum, packed, local_size,
                len(local_name), 0,
            ) + local_name + entry.real  # fmt: skip
        directory += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 3 << 8 | 20, 20, entry.flags, entry.method, 0, 33, checksum, packed,
            size, len(entry.name), len(entry.extra), 0, 0, 0, entry.mode << 16,
            at if entry.offset is None else entry.offset,
        ) + entry.name + entry.extra  # fmt: skip
    start = len(out)
    count = end.get("count", len(entries))
    if count > 0xFFFF:
        out += directory
        out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(directory), start)
        out += struct.pack("<IIQI", 0x07064B50, 0, start + len(directory), 1)
        path.write_bytes(out + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
        return path
    out += directory + struct.pack(
        "<IHHHHIIH", 0x06054B50, end.get("disk", 0), 0, count, count, end.get("size", len(directory)),
        end.get("start", start), 0,
    )  # fmt: skip
    path.write_bytes(out)
    return path


def gzipped(path: Path, data: bytes) -> Path:
    """Write one gzip file."""
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    return path
