"""CIFAR-10 and CIFAR-100 as their authors publish them for Python: pickles in a tar."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.domain.datasets import SPLITS, Split
from app.domain.errors import DataFault
from worker.ingest import pickles
from worker.ingest.archive import Archive, shown
from worker.ingest.rows import Rows, Source, pixel_rows

_LABELS = (("labels", "label_names"), ("fine_labels", "fine_label_names"))


class _Batch(NamedTuple):
    split: Split
    pixels: np.ndarray  # [n, 3, 32, 32]
    labels: np.ndarray
    names: list[str]


def recognise(head: bytes) -> bool:
    """Tell whether a file begins as these pickles do: an empty dictionary is the first thing built."""
    return head[:1] == b"\x80" and b"}" in head[2:12]


def read(archive: Archive, numbers: list[int], scratch: Path) -> Source:
    """Read the batches and their class names. Raises `DataFault`."""
    found: dict[str, dict[str, Any]] = {}
    for number in sorted(numbers, key=lambda n: archive.names[n]):
        name = archive.names[number]
        path = scratch / f"pickle-{number}"
        archive.unpack(number, path)
        with open(path, "rb") as file:
            found[name] = pickles.load(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), shown(name))
        path.unlink()  # the map keeps it
    batches = {name: content for name, content in found.items() if "data" in content}
    if not batches:
        raise DataFault(
            f"no CIFAR batch in the archive: {', '.join(map(shown, found))} hold no 'data'", code="no_images",
            phase="read", hint="expected data_batch_1 … test_batch, or train and test, with labels",
        )  # fmt: skip
    key, classes_key = next((pair for pair in _LABELS if all(pair[0] in b for b in batches.values())), (None, ""))
    if key is None:
        raise DataFault(
            "a CIFAR batch has neither 'labels' nor 'fine_labels'", code="invalid_data", phase="read",
            hint="upload the original python archive",
        )  # fmt: skip
    parts = [_batch(name, content, key) for name, content in batches.items()]
    parts.sort(key=lambda part: SPLITS.index(part.split))
    classes = _classes(found, classes_key, max(int(part.labels.max(initial=-1)) for part in parts) + 1)
    return Source(
        "cifar", classes, _rows(parts), sum(part.pixels.nbytes for part in parts),
    )  # fmt: skip


def _batch(name: str, content: dict[str, Any], key: str) -> _Batch:
    pixels, labels = content["data"], content[key]
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DataFault(f"{shown(name)}: 'data' is no uint8 array of 3072 values a row", phase="read")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataFault(f"{shown(name)}: {len(pixels)} images, but not as many labels", phase="read")
    if any(type(label) is not int or not 0 <= label < 256 for label in labels):
        raise DataFault(f"{shown(name)}: row {_first_bad(labels)} has a label that is no class number", phase="read")
    said = content.get("batch_label")
    text = bytes(said).decode("ascii", "replace") if isinstance(said, memoryview) else str(said or name)
    split: Split = "test" if "test" in text.lower().rsplit("/", 1)[-1] else "train"
    files = content.get("filenames")
    base = name.rsplit("/", 1)[-1]
    names = [f"{split}/{base}/{number:05d}.png" for number in range(len(pixels))]
    if isinstance(files, list) and len(files) == len(pixels):
        names = [f"{split}/{_file(file) or names[at]}" for at, file in enumerate(files)]
    return _Batch(split, pixels.reshape(-1, 3, 32, 32), np.asarray(labels, np.int64), names)


def _file(value: Any) -> str:
    text = bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else str(value)
    return shown(text.rsplit("/", 1)[-1])


def _first_bad(labels: list[Any]) -> int:
    return next(at for at, label in enumerate(labels) if type(label) is not int or not 0 <= label < 256)


def _classes(found: dict[str, dict[str, Any]], key: str, least: int) -> tuple[str, ...]:
    for content in found.values():
        names = content.get(key)
        if isinstance(names, list) and len(names) >= least:
            return tuple(_file(name) for name in names)
    return tuple(str(number) for number in range(least))


def _rows(parts: list[_Batch]) -> Iterator[Rows]:
    for part in parts:
        yield from pixel_rows(part.pixels, part.labels, part.split, part.names)
