"""What every format comes to: rows of known split, name and label, whose bytes are read when it is their turn."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from app.domain.datasets import Split
from app.domain.errors import DataFault
from worker.ingest.archive import SPAN, Archive, Bytes, Problem, Refused, shown

CHUNK_ROWS = 256
SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
UNLABELLED = frozenset({"unlabeled", "unlabelled", "unsupervised"})


@dataclass(frozen=True, slots=True)
class Rows:
    """Some neighbouring rows of one split; `read` gives their encoded images, or why one cannot be had."""

    split: Split
    names: Sequence[str]
    labels: Sequence[int | None]
    bytes: int  # about, for the progress
    read: Callable[[], "Sequence[Bytes | Refused]"]
    made: bool = False  # encoded by ourselves from plain pixels, so no stranger's bytes reach a decoder


@dataclass(slots=True)
class Source:
    """A recognised upload. `rows` come in the order train, validation, test."""

    format: str
    classes: tuple[str, ...]
    rows: Iterable[Rows]
    bytes: int  # the sum of all `Rows.bytes`
    problems: list[Problem] = field(default_factory=list[Problem])
    ignored: list[Problem] = field(default_factory=list[Problem])
    warnings: list[str] = field(default_factory=list[str])
    close: Callable[[], None] = lambda: None


def chunks(archive: Archive, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut entries into chunks of bounded rows and bytes."""
    start, total = 0, 0
    for at, number in enumerate(numbers):
        if at > start and (at - start >= CHUNK_ROWS or total + archive.sizes[number] > SPAN):
            yield numbers[start:at]
            start, total = at, 0
        total += archive.sizes[number]
    if start < len(numbers):
        yield numbers[start:]


def pixel_rows(
    pixels: np.ndarray, labels: np.ndarray | None, split: Split, names: Sequence[str] | None = None
) -> Iterator[Rows]:
    """Make rows of plain pixels `[n, height, width]` or `[n, 3, height, width]`, uint8; each becomes a PNG."""
    for start in range(0, len(pixels), CHUNK_ROWS):
        part = pixels[start : start + CHUNK_ROWS]
        end = start + len(part)
        yield Rows(
            split,
            names[start:end] if names is not None else [f"{split}/{number:06d}.png" for number in range(start, end)],
            [None] * len(part) if labels is None else labels[start:end].tolist(),
            part.nbytes,
            lambda part=part: [encode(image) for image in part],
            made=True,
        )


def encode(pixels: np.ndarray) -> bytes:
    """Encode `[height, width]` or `[3, height, width]`, uint8, as PNG."""
    image = torch.from_numpy(np.array(pixels, order="C"))
    return torch.ops.image.encode_png.default(image if image.ndim == 3 else image[None], 6).numpy().tobytes()


def nothing_found(what: str, names: Sequence[str]) -> DataFault:
    """Make the fault for a container without usable images: what was there, and what was expected."""
    found = ", ".join(shown(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return DataFault(
        f"no images in the {what}: it holds {len(names)} files" + (f" ({found})" if names else ""),
        code="no_images",
        phase="read",
        hint="expected [train|validation|test/]class/image.jpg (JPEG, PNG, WebP, GIF), a flat folder of images, "
        "the CIFAR python tar, MNIST idx files, or Parquet in the Hub's image layout",
    )
