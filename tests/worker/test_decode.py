"""The one image policy: what each format becomes, what is refused with which words, and sizes before decoding."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from worker.parts import decode

pytestmark = pytest.mark.worker

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def png(width: int, height: int, colour: int = 0) -> bytes:
    """A PNG header that promises any size, with hardly a pixel behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


SIXTEEN = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
GOOD = {
    "jpeg": (save(PICTURE, "JPEG"), decode.Header("jpeg", 30, 20)),
    "progressive": (save(PICTURE, "JPEG", progressive=True), decode.Header("jpeg", 30, 20)),
    "grey jpeg": (save(PICTURE.convert("L"), "JPEG"), decode.Header("jpeg", 30, 20, 1)),
    "cmyk": (save(PICTURE.convert("CMYK"), "JPEG"), decode.Header("jpeg", 30, 20, cmyk=True)),
    "png": (save(PICTURE, "PNG"), decode.Header("png", 30, 20)),
    "palette": (save(PICTURE.convert("P"), "PNG"), decode.Header("png", 30, 20, palette=True)),
    "one bit": (save(PICTURE.convert("1"), "PNG"), decode.Header("png", 30, 20, 1)),
    "grey": (save(PICTURE.convert("L"), "PNG"), decode.Header("png", 30, 20, 1)),
    "grey alpha": (save(PICTURE.convert("LA"), "PNG"), decode.Header("png", 30, 20, 1, alpha=True)),
    "alpha": (save(PICTURE.convert("RGBA"), "PNG"), decode.Header("png", 30, 20, alpha=True)),
    "sixteen bits": (save(SIXTEEN, "PNG"), decode.Header("png", 30, 20, 1, 16)),
    "gif": (save(PICTURE, "GIF"), decode.Header("gif", 30, 20, palette=True)),
    "webp": (save(PICTURE, "WEBP"), decode.Header("webp", 30, 20)),
    "lossless": (save(PICTURE, "WEBP", lossless=True), decode.Header("webp", 30, 20)),
    "webp alpha": (save(Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, :1]])), "WEBP"),
                   decode.Header("webp", 30, 20, alpha=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_every_format_has_its_header_and_its_pixels(name: str) -> None:
    data, expected = GOOD[name]
    assert decode.header(data) == expected
    image = decode.decode(data)
    assert image.shape == (expected.channels, 20, 30)
    assert image.dtype == (torch.uint16 if expected.bits == 16 else torch.uint8)


@pytest.mark.parametrize(
    "name", ["png", "palette", "grey", "grey alpha", "alpha", "one bit", "gif", "lossless", "cmyk"]
)
def test_pixels_equal_those_of_another_decoder(name: str) -> None:
    data, head = GOOD[name]
    with Image.open(io.BytesIO(data)) as image:
        other = np.asarray(image.convert("L" if head.channels == 1 else "RGB"), dtype=np.int16)
    ours = decode.decode(data).numpy().astype(np.int16)
    ours = ours[0] if head.channels == 1 else ours.transpose(1, 2, 0)
    assert np.abs(ours - other).max() <= (2 if name == "cmyk" else 0)


def test_sixteen_bits_are_kept() -> None:
    assert np.array_equal(decode.decode(GOOD["sixteen bits"][0])[0].numpy(), np.asarray(SIXTEEN))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.linear_gradient("L").resize((32, 16)).convert("RGB")
    smooth.paste((255, 0, 0), (0, 0, 10, 5))
    data = save(smooth, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 95}))
    with Image.open(io.BytesIO(data)) as image:
        turned = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.int16).transpose(2, 0, 1)
    assert np.abs(decode.decode(data).numpy().astype(np.int16) - turned).max() <= 2


def test_only_the_first_frame_of_an_animation() -> None:
    frames = [PICTURE.rotate(90 * turn) for turn in range(1, 40)]
    animation = save(PICTURE, "GIF", save_all=True, append_images=frames)
    assert torch.equal(decode.decode(animation), decode.decode(save(PICTURE, "GIF")))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (GOOD["jpeg"][0][:-1], "truncated"),
        (GOOD["jpeg"][0][:300], "truncated"),
        (GOOD["jpeg"][0][:30], "truncated"),
        (b"\xff\xd8\xff", "truncated"),
        (GOOD["progressive"][0][:-200], "truncated"),
        (GOOD["png"][0][:-100], "truncated"),
        (GOOD["png"][0][:20], "truncated"),
        (GOOD["gif"][0][:-10], "truncated"),
        (GOOD["gif"][0][:11], "truncated"),
        (GOOD["webp"][0][:20], "truncated"),
        (GOOD["webp"][0][:-9], "damaged"),
        (b"\xff\xd8\xff\xda" + b"\0" * 99, "damaged: no frame header before the pixels"),
        (png(0, 9), "the header gives no size"),
        (png(9, 9, 5), "damaged: PNG colour type 5"),
        (save(PICTURE, "BMP"), "BMP is not supported; convert it to JPEG or PNG"),
        (save(PICTURE, "TIFF"), "TIFF is not supported; convert it to JPEG or PNG"),
        (save(PICTURE, "JPEG2000"), "JPEG 2000 is not supported; convert it to JPEG or PNG"),
        (b"\0\0\0\x1cftypavif" + b"\0" * 9, "AVIF is not supported; convert it to JPEG or PNG"),
        (b"\0\0\0\x1cftypheic" + b"\0" * 9, "HEIC is not supported; convert it to JPEG or PNG"),
        (save(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(9)]), "animated WebP is not supported"),
    ],
)  # fmt: skip
def test_a_refusal_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(decode.Undecodable) as caught:
        decode.decode(data)
    assert str(caught.value).startswith(reason)


def test_the_header_alone_tells_a_bomb() -> None:
    assert decode.header(png(60_000, 60_000))[1:3] == (60_000, 60_000)
    jpeg = GOOD["jpeg"][0]
    at = jpeg.index(b"\xff\xc0")
    assert decode.header(jpeg[: at + 5] + b"\xff\xff\xff\xff" + jpeg[at + 9 :])[1:3] == (65_535, 65_535)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes(wrap: type) -> None:
    assert decode.decode(wrap(GOOD["jpeg"][0])).shape == (3, 20, 30)
