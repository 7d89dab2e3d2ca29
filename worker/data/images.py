"""Images of a dataset's split as uint8 rows: decoded once into a memory map beside the worker, or while training.

Every image is resized to a square (bilinear, antialiased) with torchvision's own function on bytes, so that the lines
in a model card repeat it bit for bit. Nothing is cut off: what lies at the edge of a picture may be its subject.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torchvision.transforms.v2.functional as v2
from torch import Tensor

from app.domain.datasets import SPLITS, DatasetFacts
from app.domain.errors import DataFault
from worker.data.shelf import Shelf
from worker.data.staged import Staged
from worker.parts.decode import Undecodable, decode
from worker.recipe import Batch
from worker.report import Reporter
from worker.ticker import Ticker

POLICY = "square-1"  # part of every cache key; changes with what `fit` does
CHUNK = 256


@dataclass(frozen=True)
class Images:
    """The decoded rows of one split, mapped from disk."""

    pixels: Tensor  # uint8 [rows, channels, size, size]
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

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:  # noqa: ARG002 (the same in every epoch)
        """Give the rows of these numbers."""
        return {
            "image": self.pixels.index_select(0, rows.to(self.pixels.device)),
            "label": self.labels[rows],
            "index": rows + self.first,
        }


@dataclass(frozen=True)
class Streamed:
    """The rows of one split, decoded whenever they are read."""

    encoded: "Encoded"
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

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:  # noqa: ARG002 (the same in every epoch)
        """Decode the rows of these numbers."""
        channels, size = self.shape
        self.encoded.check()
        made = self.pool.map(lambda row: self.encoded.decoded(row, channels, size), rows.tolist())
        return {"image": torch.stack(list(made)), "label": self.labels[rows], "index": rows + self.first}


class Encoded:
    """The encoded bytes of one split: Arrow shards mapped into memory, read by row.

    Raises:
        SystemFault: a shard is not what ingest wrote.
    """

    def __init__(self, facts: DatasetFacts, split: str) -> None:
        self.split = split
        self._staged: list[Staged] = []
        columns: list[pa.ChunkedArray] = []
        labels: list[np.ndarray] = []
        for shard in sorted((s for s in facts.shards if s.split == split), key=lambda s: s.index):
            staged = Staged(shard, facts.id)
            staged.check()
            self._staged.append(staged)
            table = pa.ipc.open_stream(pa.memory_map(staged.path)).read_all()
            columns.append(table["image"])
            if "label" in table.column_names:
                labels.append(table["label"].fill_null(-1).to_numpy().astype(np.int64))
            else:
                labels.append(np.full(len(table), -1, np.int64))
        chunks = [chunk for column in columns for chunk in column.chunks]
        self._bytes = [chunk.field("bytes") for chunk in chunks]
        self._paths = [chunk.field("path") for chunk in chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self.labels = torch.from_numpy(np.concatenate(labels)) if labels else torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def check(self) -> None:
        """Make sure that the shards are still what ingest wrote; asked before every batch and after the last.

        Raises:
            SystemFault: one is not.
        """
        for staged in self._staged:
            staged.check()

    def decoded(self, row: int, channels: int, size: int) -> Tensor:
        """Decode one row to uint8 [channels, size, size].

        Raises:
            DataFault: it cannot be decoded; the message names the file and the row.
        """
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[chunk])
        try:
            # Arrow calls its bytes signed; the decoder compares them with 0xFF.
            data = memoryview(self._bytes[chunk][place].as_buffer()).cast("B")
            return fit(decode(data), channels, size)
        except Undecodable as error:
            name = self._paths[chunk][place].as_py()
            raise DataFault(
                f"{name or 'An image'} ({self.split} row {row}) cannot be decoded: {error}.", code="undecodable_image",
                hint="Upload the dataset again without it.",
            ) from error  # fmt: skip


def fit(image: Tensor, channels: int, size: int) -> Tensor:
    """Bring a decoded image [1 or 3, height, width] to uint8 [channels, size, size]."""
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    if len(image) != channels:
        image = image.expand(3, -1, -1) if channels == 3 else v2.rgb_to_grayscale(image)
    return image if image.shape[1:] == (size, size) else v2.resize(image, [size, size], antialias=True)


def open_images(
    facts: DatasetFacts, split: str, *, image_size: int, channels: int, cache: Path, cache_bytes: int, threads: int,
    reporter: Reporter,
) -> Images | Streamed:  # fmt: skip
    """Open one split; its first use at this size decodes it into the cache, which all jobs of the host share.

    A split that does not fit the budget or the disk is decoded while training instead, and an event says so.

    Raises:
        DataFault: a row cannot be decoded.
        SystemFault: a shard is not what ingest wrote.
        ResourceFault: the disk is full.
    """
    rows = facts.splits.get(split, 0)
    first = sum(facts.splits.get(before, 0) for before in SPLITS[: SPLITS.index(split)])  # type: ignore[arg-type]
    key = _key(facts, split, image_size, channels)
    needed = rows * channels * image_size**2 + rows * 8
    shelf = Shelf(cache / "images", cache_bytes)
    made = False

    tick, waits = Ticker(reporter, f"decode {split}"), count(1)

    def make(folder: Path) -> None:
        nonlocal made
        made = True
        _decode_all(Encoded(facts, split), folder, channels, image_size, threads, tick)

    if not shelf.has_room(key, needed):
        reporter.event(
            "data.streaming",
            f"The decoded {split} split would take {needed / 1e9:.1f} GB, more than this worker may keep: images are "
            "decoded while training.", split=split, bytes=needed,
        )  # fmt: skip
        return _stream(facts, split, first, channels, image_size, threads, key)
    folder = shelf.get(key, needed, make, waiting=lambda: tick(next(waits)))
    if _size(folder) != (needed - rows * 8, rows * 8):  # cut short: a memory map of it would end in a fatal signal
        shelf.remove(key)
        folder = shelf.get(key, needed, make, waiting=lambda: tick(next(waits)))
    code, text = ("data.decoded", "Decoded") if made else ("data.cached", "Found decoded before:")
    reporter.event(code, f"{text} {rows} {split} images at {image_size} pixels.", split=split, rows=rows, bytes=needed)
    return _mapped(folder, rows, channels, image_size, first, key)


def _size(folder: Path) -> tuple[int, ...]:
    return tuple((folder / name).stat().st_size if (folder / name).exists() else 0 for name in ("pixels", "labels"))


def _key(facts: DatasetFacts, split: str, image_size: int, channels: int) -> str:
    parts = (facts.sha256, split, image_size, channels, POLICY, "uint8")
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:40]


def _mapped(folder: Path, rows: int, channels: int, size: int, first: int, key: str) -> Images:
    about = json.loads((folder / "about.json").read_text())
    shape = (rows, channels, size, size)
    # Copy on write: torch wants memory that could be written, and nobody ever writes.
    pixels = np.memmap(folder / "pixels", np.uint8, "c", shape=shape) if rows else np.empty(shape, np.uint8)
    labels = np.fromfile(folder / "labels", np.int64)
    return Images(
        torch.from_numpy(pixels), torch.from_numpy(labels), first, tuple(about["mean"]), tuple(about["std"]), key
    )


def _decode_all(encoded: Encoded, folder: Path, channels: int, size: int, threads: int, tick: Ticker) -> None:
    rows = len(encoded)
    path = folder / "pixels"
    with path.open("wb") as file:
        if rows:
            # Reserved, because a full disk under a memory map is a fatal signal and no error.
            os.posix_fallocate(file.fileno(), 0, rows * channels * size * size)
    shape = (rows, channels, size, size)
    pixels = torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=shape) if rows else np.empty(shape, np.uint8))
    total, squares = torch.zeros(2, channels, dtype=torch.float64)

    def chunk(start: int) -> tuple[Tensor, Tensor]:
        encoded.check()
        part = pixels[start : start + CHUNK]
        for offset in range(len(part)):
            part[offset] = encoded.decoded(start + offset, channels, size)
        return _moments(part)

    with _pool(threads) as pool:
        for number, (sums, squared) in enumerate(pool.map(chunk, range(0, rows, CHUNK))):
            total, squares = total + sums, squares + squared
            tick(min((number + 1) * CHUNK, rows), rows)
    encoded.check()
    (folder / "labels").write_bytes(encoded.labels.numpy().tobytes())  # `tofile` hides why it fails
    mean, std = _normalisation(total, squares, rows * size * size)
    (folder / "about.json").write_text(json.dumps({"mean": mean, "std": std}))


def _stream(facts: DatasetFacts, split: str, first: int, channels: int, size: int, threads: int, key: str) -> Streamed:
    encoded = Encoded(facts, split)
    pool = _pool(threads)
    # Every n-th image is enough for a mean; the same ones each time.
    some = range(0, len(encoded), max(1, len(encoded) // 2048))
    total, squares = torch.zeros(2, channels, dtype=torch.float64)
    for sums, squared in pool.map(lambda row: _moments(encoded.decoded(row, channels, size)[None]), some):
        total, squares = total + sums, squares + squared
    mean, std = _normalisation(total, squares, len(some) * size * size)
    return Streamed(encoded, encoded.labels, first, tuple(mean), tuple(std), key, (channels, size), pool)


def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sum pixels and their squares per channel, exactly."""
    flat = images.transpose(0, 1).flatten(1).to(torch.int32)
    return flat.sum(1).double(), (flat * flat).sum(1).double()


def _normalisation(total: Tensor, squares: Tensor, count: int) -> tuple[list[float], list[float]]:
    mean = total / max(count, 1) / 255
    variance = (squares / max(count, 1) / 255**2 - mean**2).clamp(min=0)
    std = variance.sqrt()
    return _rounded(mean), _rounded(torch.where(std < 1e-3, 1.0, std))


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]


def native_size(facts: DatasetFacts) -> int:
    """Choose a size that suits the images: their own when they are small and all alike, else a usual one near it."""
    shorter = [min(facts.image_sizes[f"{end}_height"], facts.image_sizes[f"{end}_width"]) for end in ("min", "max")]
    if shorter[0] == shorter[1] <= 64:
        return max(shorter[0], 8)
    typical = (shorter[0] * shorter[1]) ** 0.5
    return max((size for size in (16, 32, 64, 128, 224) if size <= typical), default=8)
