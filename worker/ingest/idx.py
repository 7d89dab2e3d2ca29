"""MNIST's idx files, alone or in an archive, gzipped or not: images and labels are paired by their names.

The format: two zero bytes, a type (8 is uint8), the number of dimensions, each dimension as a big-endian uint32, data.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from app.domain.datasets import SPLITS, Split
from app.domain.errors import DataFault
from worker.ingest.archive import Archive, Problem, damaged, shown
from worker.ingest.rows import Rows, Source, pixel_rows
from worker.ingest.tars import gunzip
from worker.report import Limits

_KIND = re.compile(r"(images?|labels?)[-_.]*(idx\d)?", re.IGNORECASE)


class _File(NamedTuple):
    name: str
    values: np.ndarray


def recognise(head: bytes) -> bool:
    """Tell whether a file begins as an idx file of bytes does."""
    return len(head) >= 8 and head[:3] == b"\0\0\x08" and 1 <= head[3] <= 4


def read_archive(archive: Archive, numbers: list[int], scratch: Path, limits: Limits) -> Source:
    """Read the idx files of an archive. Raises `DataFault`."""
    files: list[_File] = []
    for number in sorted(numbers, key=lambda n: archive.names[n]):
        path = scratch / f"idx-{number}"
        archive.unpack(number, path)
        files.append(_open(path, archive.names[number], scratch, limits))
    return _source(files)


def read_file(path: Path, name: str) -> Source:
    """Read one idx file of images, without labels. Raises `DataFault`."""
    return _source([_File(name, _array(path, name))])


def _open(path: Path, name: str, scratch: Path, limits: Limits) -> _File:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        plain = scratch / f"{path.name}-plain"
        gunzip(path, plain, limits, lambda _: None)
        path = plain
    return _File(name, _array(path, name))


def _array(path: Path, name: str) -> np.ndarray:
    with open(path, "rb") as file:
        head = file.read(20)
    if not recognise(head):
        raise DataFault(f"{shown(name)} is no idx file of bytes", phase="read", hint="expected MNIST's idx format")
    dimensions = head[3]
    shape = tuple(int.from_bytes(head[4 + 4 * n : 8 + 4 * n], "big") for n in range(dimensions))
    size = int(np.prod(np.array(shape, dtype=object)))
    there = path.stat().st_size - 4 - 4 * dimensions
    if there != size:
        raise damaged(f"{shown(name)} announces {' x '.join(map(str, shape))} values and holds {max(there, 0)} bytes")
    if not size:
        return np.empty(shape, np.uint8)
    return np.memmap(path, np.uint8, "r", 4 + 4 * dimensions, shape)


def _split(name: str) -> Split:
    text = name.lower()
    if "t10k" in text or "test" in text:
        return "test"
    return "validation" if "val" in text else "train"


def _source(files: list[_File]) -> Source:
    labels = {_KIND.sub("", file.name): file for file in files if file.values.ndim == 1}
    parts: list[tuple[Split, str, np.ndarray, np.ndarray | None]] = []
    for file in files:
        if file.values.ndim == 1:
            continue
        if file.values.ndim == 4 and file.values.shape[3] == 3:
            pixels = file.values.transpose(0, 3, 1, 2)
        elif file.values.ndim == 3:
            pixels = file.values
        else:
            raise DataFault(f"{shown(file.name)} has {file.values.ndim} dimensions", phase="read",
                            hint="expected images as [n, height, width]")  # fmt: skip
        own = labels.pop(_KIND.sub("", file.name), None)
        if own is None and len(files) == 2 and len(labels) == 1:
            own = labels.popitem()[1]
        if own is not None and len(own.values) != len(pixels):
            raise DataFault(
                f"{shown(file.name)} has {len(pixels)} images and {shown(own.name)} {len(own.values)} labels",
                phase="read", hint="upload the files that belong together",
            )  # fmt: skip
        parts.append((_split(file.name), file.name, pixels, own.values.astype(np.int64) if own else None))
    if not parts:
        raise DataFault(
            f"only labels in {', '.join(shown(file.name) for file in files)}", code="no_images", phase="read",
            hint="upload the images-idx3-ubyte file too, in one zip or tar",
        )  # fmt: skip
    parts.sort(key=lambda part: SPLITS.index(part[0]))
    least = max((int(own.max(initial=-1)) + 1 for _, _, _, own in parts if own is not None), default=0)
    return Source(
        "idx", tuple(str(number) for number in range(least)), _rows(parts), sum(part[2].nbytes for part in parts),
        [Problem(shown(file.name), "labels without images") for file in labels.values()],
    )  # fmt: skip


def _rows(parts: list[tuple[Split, str, np.ndarray, np.ndarray | None]]) -> Iterator[Rows]:
    for split, name, pixels, labels in parts:
        if min(pixels.shape[1:]) < 1:
            raise DataFault(f"{shown(name)} holds images without pixels", phase="read")
        base = re.sub(r"\W+", "-", _KIND.sub("", name.rsplit("/", 1)[-1])).strip("-")
        names = [f"{split}/{base}-{number:06d}.png" for number in range(len(pixels))]
        yield from pixel_rows(pixels, labels, split, names)
