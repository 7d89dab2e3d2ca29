"""Images of a dataset's split as integer rows: decoded once into a memory map beside the worker, or while training.

Where a dataset has images of 16 bits, all its rows are uint16, else uint8.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.domain.datasets import SPLITS, DatasetFacts
from worker.data.encoded import Encoded
from worker.data.rows import Array, mapped_rows, total_bytes
from worker.data.shelf import NoRoom, Shelf, entry_key
from worker.data.source import carried
from worker.disk import amount
from worker.parts import machine
from worker.recipe import Batch
from worker.report import Reporter
from worker.ticker import Ticker

POLICY = "square-1"  # part of every cache key; changes with what `fit` does
CHUNK = 256
PIECE = 2**16  # numbers of which moments are taken at once


@dataclass(frozen=True)
class Images:
    """The decoded rows of one split, mapped from disk."""

    pixels: Tensor  # uint8 or uint16 [rows, channels, size, size]
    labels: Tensor  # int64 [rows], -1 = no label
    first: int  # the number of the first sample, counted over all splits
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    key: str  # names these pixels in other caches
    slow: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def on(self, device: torch.device) -> "Images":
        """Give the same rows with their pixels on a device."""
        return replace(self, pixels=self.pixels.to(device))

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Give the rows of these numbers."""
        return {
            "image": _as_kept(_movable(self.pixels).index_select(0, carried(rows, self.pixels.device)), self.pixels),
            "label": self.labels[rows],
            "index": self.numbers(rows),
            "epoch": torch.full_like(rows, epoch),
        }

    def numbers(self, rows: Tensor) -> Tensor:
        """Give the sample numbers of these rows."""
        return rows + self.first


@dataclass(frozen=True)
class Streamed:
    """The rows of one split, decoded whenever they are read."""

    encoded: Encoded
    labels: Tensor
    first: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    key: str
    shape: tuple[int, int]  # channels, size
    pool: ThreadPoolExecutor
    slow: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Decode the rows of these numbers."""
        channels, size = self.shape
        numbers = rows.tolist()
        read = self.encoded.read(numbers)
        made = list(self.pool.map(lambda row, data: self.encoded.decoded(row, data, channels, size), numbers, read))
        images = _as_kept(torch.stack([_movable(image) for image in made]), made[0])
        epochs = torch.full_like(rows, epoch)
        return {"image": images, "label": self.labels[rows], "index": self.numbers(rows), "epoch": epochs}

    def numbers(self, rows: Tensor) -> Tensor:
        """Give the sample numbers of these rows."""
        return rows + self.first


def _movable(pixels: Tensor) -> Tensor:
    """Give the same memory as a type that torch can index and stack: uint16 is hardly more than storage."""
    return pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels


def _as_kept(moved: Tensor, like: Tensor) -> Tensor:
    return moved.view(torch.uint16) if like.dtype == torch.uint16 else moved


def open_images(
    facts: DatasetFacts, split: str, *, image_size: int, channels: int, shelf: Shelf, threads: int, reporter: Reporter
) -> Images | Streamed:
    """Open one split; its first use at this size decodes it onto the shelf, which all jobs of the host share.

    A split that does not fit the budget or the disk is decoded while training instead, and an event says so.

    Raises:
        DataFault: a row cannot be decoded.
        SystemFault: a shard is not what ingest wrote.
    """
    rows = facts.splits.get(split, 0)
    first = sum(facts.splits.get(before, 0) for before in SPLITS[: SPLITS.index(split)])  # type: ignore[arg-type]
    key = entry_key("images", facts.sha256, split, image_size, channels, POLICY, facts.bits, machine.fingerprint("cpu"))
    arrays = {
        "pixels": Array(torch.uint16 if facts.bits == 16 else torch.uint8, (rows, channels, image_size, image_size)),
        "labels": Array(torch.int64, (rows,)),
        "moments": Array(torch.float64, (2, channels)),  # mean and deviation
    }
    needed, tick = total_bytes(arrays), Ticker(reporter, f"decode {split}")
    try:
        found, made = mapped_rows(
            shelf, key, arrays, lambda arrays: _decode_all(Encoded(facts, split), arrays, threads, tick), tick
        )
    except NoRoom as short:
        reporter.event(
            "data.streaming",
            f"The decoded {split} split would take {amount(needed)}, and {short}: images are decoded while training.",
            split=split, bytes=needed,
        )  # fmt: skip
        return _stream(facts, split, first, channels, image_size, threads, key)
    code, text = ("data.decoded", "Decoded") if made else ("data.cached", "Found decoded before:")
    reporter.event(code, f"{text} {rows} {split} images at {image_size} pixels.", split=split, rows=rows, bytes=needed)
    mean, std = (tuple(each) for each in found["moments"].tolist())
    return Images(found["pixels"], found["labels"].clone(), first, mean, std, key)


def _decode_all(encoded: Encoded, arrays: dict[str, Tensor], threads: int, tick: Ticker) -> None:
    pixels = arrays["pixels"]
    rows, channels, size = pixels.shape[:3]
    total, squares = torch.zeros(2, channels, dtype=torch.float64)

    def chunk(start: int) -> tuple[Tensor, Tensor]:
        part = pixels[start : start + CHUNK]
        for offset, data in enumerate(encoded.read(range(start, start + len(part)))):
            part[offset] = encoded.decoded(start + offset, data, channels, size)
        return _moments(part)

    with _pool(threads) as pool:
        for number, (sums, squared) in enumerate(pool.map(chunk, range(0, rows, CHUNK))):
            total, squares = total + sums, squares + squared
            tick(min((number + 1) * CHUNK, rows), rows)
    arrays["labels"].copy_(encoded.labels)
    moments = _normalisation(total, squares, rows * size * size, encoded.bits)
    arrays["moments"].copy_(torch.tensor(moments, dtype=torch.float64))


def _stream(facts: DatasetFacts, split: str, first: int, channels: int, size: int, threads: int, key: str) -> Streamed:
    encoded = Encoded(facts, split)
    pool = _pool(threads)
    # Every n-th image is enough for a mean; the same ones each time.
    some = range(0, len(encoded), max(1, len(encoded) // 2048))
    total, squares = torch.zeros(2, channels, dtype=torch.float64)

    def moments(row: int) -> tuple[Tensor, Tensor]:
        (data,) = encoded.read([row])
        return _moments(encoded.decoded(row, data, channels, size)[None])

    for sums, squared in pool.map(moments, some):
        total, squares = total + sums, squares + squared
    mean, std = _normalisation(total, squares, len(some) * size * size, encoded.bits)
    return Streamed(encoded, encoded.labels, first, tuple(mean), tuple(std), key, (channels, size), pool)


def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sum pixels and their squares per channel: exactly for 8 bits, to float64's rounding for 16.

    In pieces that stay in a processor's cache.
    """
    flat, channels = images.flatten(2), images.shape[1]
    total, squares = torch.zeros(2, channels, dtype=torch.float64)
    for rows in flat.split(max(1, PIECE // flat[0].numel())):
        for piece in rows.split(max(1, PIECE // channels), dim=2):
            wide = piece.double()
            total, squares = total + wide.sum((0, 2)), squares + wide.square().sum((0, 2))
    return total, squares


def _normalisation(total: Tensor, squares: Tensor, count: int, bits: int) -> tuple[list[float], list[float]]:
    """Give mean and deviation of pixels in [0, 1], from their sums; a deviation of under a quarter step is none."""
    largest, digits = 2**bits - 1, 6 if bits == 8 else 9
    mean = total / max(count, 1) / largest
    variance = (squares / max(count, 1) / largest**2 - mean**2).clamp(min=0)
    std = torch.where(variance.sqrt() < 0.255 / largest, 1.0, variance.sqrt())
    return [round(float(value), digits) for value in mean], [round(float(value), digits) for value in std]


def native_size(facts: DatasetFacts) -> int:
    """Choose a size that suits the images: their own when they are small and all alike, else a usual one near it."""
    shorter = [min(facts.image_sizes[f"{end}_height"], facts.image_sizes[f"{end}_width"]) for end in ("min", "max")]
    if shorter[0] == shorter[1] <= 64:
        return max(shorter[0], 8)
    typical = (shorter[0] * shorter[1]) ** 0.5
    return max((size for size in (16, 32, 64, 128, 224) if size <= typical), default=8)
