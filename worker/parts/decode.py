"""Encoded images to tensors, by one policy for ingest and training; sizes are read from the header before any decoding.

JPEG, PNG, WebP and GIF (its first frame). Grey stays one channel, everything else becomes RGB: palettes are looked up,
CMYK is converted, alpha is dropped. 16-bit PNG stays uint16. EXIF orientation is applied. The operators are called
directly, because torchvision's Python functions warn about their deprecation on every call.
"""

import contextlib
import warnings
from typing import NamedTuple

import torch
import torchvision.io.image  # noqa: F401  (registers torch.ops.image)
from torch import Tensor

Bytes = bytes | bytearray | memoryview

_GREY, _RGB = 1, 3  # torchvision.io.ImageReadMode
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))  # SOFn markers
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_CONVERT = "convert it to JPEG or PNG"
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "Photoshop"),
    (0, b"gimp xcf", "XCF"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%!PS", "PostScript"),
    *((0, b"P" + kind + space, "PNM") for kind in (b"4", b"5", b"6") for space in (b"\n", b" ")),
)

with warnings.catch_warnings():  # torch says once per process that a tensor over `bytes` must not be written to
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class Undecodable(ValueError):
    """These bytes are no image that can be used; the message is the reason, without a name."""


class Header(NamedTuple):
    """What the first bytes of an image say; width and height are as stored, before EXIF orientation."""

    format: str
    width: int
    height: int
    channels: int = 3  # after decoding
    bits: int = 8
    alpha: bool = False
    palette: bool = False
    cmyk: bool = False


def sniff(data: Bytes) -> str | None:
    """Name the image format by its magic bytes: one of `jpeg png webp gif`, another one's name, or null."""
    head = bytes(data[:16])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return next((name for at, magic, name in _OTHERS if head.startswith(magic, at)), None)


def header(data: Bytes) -> Header:
    """Read format and size without decoding. Raises `Undecodable`."""
    kind = sniff(data)
    try:
        if kind == "jpeg":
            found = _jpeg(data)
        elif kind == "png":
            found = _png(data)
        elif kind == "webp":
            found = _webp(data)
        elif kind == "gif":
            found = _gif(data)
        elif kind:
            raise Undecodable(f"{kind} is not supported; {_CONVERT}")
        else:
            raise Undecodable("not an image" if len(data) else "empty file")
    except IndexError:
        raise Undecodable("truncated") from None
    if found.width < 1 or found.height < 1:
        raise Undecodable("the header gives no size")
    return found


def decode(data: Bytes, known: Header | None = None) -> Tensor:
    """Decode to `[1 or 3, height, width]`, uint8, or uint16 for 16-bit PNG.

    Pass the header if it was read already. Raises `Undecodable`. Bytes that nobody has vetted can crash the decoder
    (torchvision 0.29 does on a PNG with a wrong checksum), so ingest calls this in a process of its own.
    """
    known = known or header(data)
    mode = _GREY if known.channels == 1 else _RGB
    try:
        if known.format == "jpeg":
            return torch.ops.image.decode_jpeg.default(torch.frombuffer(data, dtype=torch.uint8), mode, True)
        if known.format == "png":
            return torch.ops.image.decode_png.default(torch.frombuffer(data, dtype=torch.uint8), mode, True)
        if known.format == "webp":
            image = torch.ops.image.decode_webp.default(torch.frombuffer(data, dtype=torch.uint8), mode)
            return _turn(image, _webp_orientation(data))
        image = torch.ops.image.decode_gif.default(torch.frombuffer(_first_frame(data), dtype=torch.uint8))
        return image[0] if image.ndim == 4 else image
    except IndexError:
        raise Undecodable("truncated") from None
    except RuntimeError as error:
        raise Undecodable(_reason(str(error))) from error


def _reason(message: str) -> str:
    text = message.lower()
    if "memory" in text and "alloc" in text:
        return "decoding it needs more memory than is allowed"
    if "truncated" in text or "incomplete" in text or "out of bound" in text:
        return "truncated"
    if "animated" in text:
        return f"animated WebP is not supported; {_CONVERT}"
    last = message.splitlines()[0].rsplit(", ", 1)[-1].strip() if message else ""
    return f"damaged: {last[:120]}" if last else "damaged"


def _jpeg(data: Bytes) -> Header:
    at, size = 2, len(data)
    while True:  # as libjpeg does: skip to a marker, skip its padding, skip its segment
        while data[at] != 0xFF:
            at += 1
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker in _FRAMES:
            components = data[at + 8]
            if components not in (1, 3, 4):
                raise Undecodable(f"a JPEG of {components} components is not supported; {_CONVERT}")
            if data[at + 3] != 8:
                raise Undecodable(f"a JPEG of {data[at + 3]} bits is not supported; {_CONVERT}")
            height, width = data[at + 4] << 8 | data[at + 5], data[at + 6] << 8 | data[at + 7]
            return Header("jpeg", width, height, 1 if components == 1 else 3, cmyk=components == 4)
        if marker in (0xDA, 0xD9):
            raise Undecodable("damaged: no frame header before the pixels")
        if marker in _BARE or marker == 0:
            at += 1
            continue
        at += 1 + (data[at + 1] << 8 | data[at + 2])
        if at >= size:
            raise Undecodable("truncated")


def _png(data: Bytes) -> Header:
    if bytes(data[12:16]) != b"IHDR":
        raise Undecodable("truncated" if len(data) < 33 else "damaged: the PNG does not begin with its header")
    kind, bits = data[25], data[24]
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    data[32]
    if kind not in (0, 2, 3, 4, 6):
        raise Undecodable(f"damaged: PNG colour type {kind}")
    return Header("png", width, height, 1 if kind in (0, 4) else 3, 16 if bits == 16 else 8, kind in (4, 6), kind == 3)


def _webp(data: Bytes) -> Header:
    kind = bytes(data[12:16])
    data[29]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        if data[20] & 0x02:
            raise Undecodable(f"animated WebP is not supported; {_CONVERT}")
        return Header("webp", width, height, alpha=bool(data[20] & 0x10))
    if kind == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return Header("webp", (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1, alpha=bool(packed >> 28 & 1))
    if kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return Header("webp", width, height)
    raise Undecodable("damaged: an unknown kind of WebP")


def _gif(data: Bytes) -> Header:
    data[12]
    width, height = (int.from_bytes(data[at : at + 2], "little") for at in (6, 8))
    return Header("gif", width, height, palette=True)


def _first_frame(data: Bytes) -> Bytes:
    """Cut a GIF after its first image: the decoder would unpack every frame of an animation."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[at] == 0x21:  # extensions
        at = _skip_blocks(data, at + 2)
    if data[at] != 0x2C:
        raise Undecodable("truncated")
    flags = data[at + 9]
    end = _skip_blocks(data, at + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    return bytes(data[:end]) + b"\x3b"


def _skip_blocks(data: Bytes, at: int) -> int:
    while data[at]:
        at += data[at] + 1
    return at + 1


def _webp_orientation(data: Bytes) -> int:
    """The decoder applies the orientation of JPEG and PNG only."""
    if bytes(data[12:16]) != b"VP8X" or not data[20] & 0x08:
        return 1
    at = 12
    with contextlib.suppress(IndexError):
        while at + 8 <= len(data):
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            if bytes(data[at : at + 4]) == b"EXIF":
                return _orientation(bytes(data[at + 8 : at + 8 + min(length, 65536)]))
            at += 8 + length + (length & 1)
    return 1


def _orientation(exif: bytes) -> int:
    exif = exif.removeprefix(b"Exif\0\0")
    order = "little" if exif[:2] == b"II" else "big"
    start = int.from_bytes(exif[4:8], order)
    for entry in range(int.from_bytes(exif[start : start + 2], order)):
        at = start + 2 + 12 * entry
        if at + 12 > len(exif):
            break
        if int.from_bytes(exif[at : at + 2], order) == 0x0112:
            return int.from_bytes(exif[at + 8 : at + 10], order)
    return 1


def _turn(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation (1 to 8) to `[channels, height, width]`."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    if orientation in (2, 3, 6, 7):
        image = image.flip(2)
    if orientation in (3, 4, 7, 8):
        image = image.flip(1)
    return image.contiguous()
