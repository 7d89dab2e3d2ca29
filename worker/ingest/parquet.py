"""Parquet as the Hub writes image sets: a column `struct<bytes, path>` and a label, splits by file name.

The `huggingface` metadata of the schema names the image column and the classes; without it the column's shape does,
and whole numbers or texts in `label` become the classes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from app.domain.datasets import SPLITS, Split
from app.domain.errors import DataFault
from worker.ingest.archive import SPAN, Archive, Bytes, Refused, damaged, hostile, shown
from worker.ingest.rows import SPLIT_NAMES, UNLABELLED, Rows, Source
from worker.report import Limits

_IMAGES = ("image", "img", "picture")
_LABELS = ("label", "labels", "fine_label", "class")
_HINT = "expected a column image: struct<bytes: binary, path: string> and, where there are labels, label: ClassLabel"
_MAX_CLASSES = 100_000


class _File(NamedTuple):
    name: str
    split: Split
    file: pq.ParquetFile
    image: str
    label: str | None
    classes: tuple[str, ...] | None  # as the schema names them


def recognise(head: bytes) -> bool:
    """Tell whether a file begins as Parquet does."""
    return head[:4] == b"PAR1"


def read_archive(archive: Archive, numbers: list[int], scratch: Path, limits: Limits) -> Source:
    """Read the Parquet files of an archive. Raises `DataFault`."""
    paths: list[tuple[Path, str]] = []
    for number in sorted(numbers, key=lambda n: archive.names[n]):
        path = scratch / f"table-{number}.parquet"
        archive.unpack(number, path)
        paths.append((path, archive.names[number]))
    return read_files(paths, limits)


def read_files(paths: Sequence[tuple[Path, str]], limits: Limits) -> Source:
    """Read Parquet files, given with the names that tell their splits. Raises `DataFault`."""
    warnings: list[str] = []
    files = sorted((_open(path, name, warnings) for path, name in paths), key=lambda f: (SPLITS.index(f.split), f.name))
    total = sum(_groups_bytes(file.file) for file in files)
    if total > limits.max_unpacked_bytes:
        raise hostile(
            f"the Parquet files announce {total} bytes; {limits.max_unpacked_bytes} are allowed",
            "raise TUNEYARD_MAX_UNPACKED_BYTES",
        )
    named = {file.classes for file in files if file.classes is not None}
    if len(named) > 1:
        raise DataFault(
            f"{shown(files[0].name)} and another file name different classes", code="invalid_data", phase="read",
            hint="write all files with one ClassLabel feature",
        )  # fmt: skip
    values = None if named or not any(file.label for file in files) else _values(files)
    classes = named.pop() if named else tuple(str(value) for value in values or ())
    return Source("parquet", classes, _rows(files, values, len(classes), limits), total, warnings=warnings)


def _open(path: Path, name: str, warnings: list[str]) -> _File:
    try:
        file = pq.ParquetFile(path, memory_map=False, pre_buffer=False)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise damaged(f"{shown(name)} is a damaged Parquet file: {str(error)[:200]}") from error
    features = _features(schema)
    image = _image_column(schema, features, name)
    label = next((column for column in _LABELS if column in schema.names), None)
    if label is None:
        label = next((column for column, feature in features.items() if feature.get("_type") == "ClassLabel"), None)
    names = features.get(label, {}).get("names") if label else None
    if label and names is None and not _is_label(schema.field(label).type):
        warnings.append(f"{shown(name)}: the column {label!r} holds neither numbers nor texts, so there are no labels")
        label = None
    unused = [column for column in schema.names if column not in (image, label)]
    if unused:
        warnings.append(f"{shown(name)}: not used: {', '.join(shown(column) for column in unused[:10])}")
    classes = tuple(str(item) for item in names[:_MAX_CLASSES]) if isinstance(names, list) else None
    return _File(name, _split(name), file, image, label, classes)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {str(key): value for key, value in found.items() if isinstance(value, dict) and key in schema.names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: pa.Schema, features: dict[str, dict[str, Any]], name: str) -> str:
    fitting = [field.name for field in schema if _is_image(field.type)]
    marked = [column for column in fitting if features.get(column, {}).get("_type") == "Image"]
    for choice in (marked, fitting):
        if choice:
            return next((column for column in _IMAGES if column in choice), choice[0])
    found = ", ".join(f"{shown(field.name)}: {str(field.type)[:60]}" for field in list(schema)[:10])
    raise DataFault(
        f"{shown(name)} has no column of images; it has {found}", code="no_images", phase="read", hint=_HINT
    )


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    inner = kind.field("bytes").type
    return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _split(name: str) -> Split:
    """`train-00000-of-00002.parquet`, or a folder of that name above it."""
    *folders, base = name.casefold().split("/")
    for word in (re.split(r"[^a-z]", base)[0], *reversed(folders)):
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
        if word in UNLABELLED:
            return "train"
    return "train"


def _groups_bytes(file: pq.ParquetFile) -> int:
    return sum(max(0, file.metadata.row_group(n).total_byte_size) for n in range(file.metadata.num_row_groups))


def _values(files: Sequence[_File]) -> list[int | str]:
    """Collect the labels that occur, where no metadata names the classes."""
    found: set[Any] = set()
    for file in files:
        if file.label:
            for batch in _batches(file, [file.label], 8192):
                found |= set(batch.column(0).unique().to_pylist())
                if len(found) > _MAX_CLASSES:
                    raise DataFault(
                        f"{shown(file.name)}: the column {file.label!r} has over {_MAX_CLASSES} values", phase="read",
                        hint="labels are class numbers or class names",
                    )  # fmt: skip
    found -= {None, -1}
    if len({type(value) for value in found}) > 1:
        raise DataFault("one file labels by number and another by name", phase="read", hint=_HINT)
    if found and all(isinstance(value, int) for value in found):
        low, high = min(found), max(found)
        return list(range(high + 1)) if low >= 0 and high < _MAX_CLASSES else sorted(found)
    return sorted(found)


def _batches(file: _File, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.file.iter_batches(size, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise damaged(f"{shown(file.name)} is a damaged Parquet file: {str(error)[:200]}") from error


def _rows(files: Sequence[_File], values: list[int | str] | None, classes: int, limits: Limits) -> Iterator[Rows]:
    numbers = {value: number for number, value in enumerate(values)} if values is not None else None
    for file in files:
        total, row = max(1, file.file.metadata.num_rows), 0
        size = max(1, min(64, SPAN * total // max(1, _groups_bytes(file.file))))
        columns = [f"{file.image}.bytes", f"{file.image}.path", *([file.label] if file.label else [])]
        share = _groups_bytes(file.file) // total
        for batch in _batches(file, columns, size):
            images = batch.column(file.image)
            data = images.field("bytes")
            inner = images.type.get_field_index("path") >= 0
            paths = images.field("path").to_pylist() if inner else [None] * len(data)
            raw = batch.column(file.label).to_pylist() if file.label else [None] * len(data)
            names = [
                shown(path) if isinstance(path, str) and path else f"{file.name}: row {row + at}"
                for at, path in enumerate(paths)
            ]
            labels, refused = _labels(raw, numbers, classes)
            yield Rows(file.split, names, labels, share * len(names), _reader(data, refused, limits))
            row += len(names)


def _labels(
    raw: Sequence[Any], numbers: dict[int | str, int] | None, classes: int
) -> tuple[list[int | None], dict[int, str]]:
    labels: list[int | None] = []
    refused: dict[int, str] = {}
    for at, value in enumerate(raw):
        label = None if value is None or value == -1 else numbers.get(value) if numbers is not None else value
        if label is not None and not (isinstance(label, int) and 0 <= label < classes):
            refused[at] = f"label {str(value)[:40]!r}, but there are {classes} classes"
            label = None
        labels.append(label)
    return labels, refused


def _reader(data: pa.Array, refused: dict[int, str], limits: Limits) -> Any:
    def read() -> list[Bytes | Refused]:
        found: list[Bytes | Refused] = []
        for at, value in enumerate(data):
            buffer = value.as_buffer()
            if at in refused:
                found.append(Refused(refused[at]))
            elif buffer is None:
                found.append(Refused("the row holds no bytes; embed the images in the file"))
            elif buffer.size > limits.max_entry_bytes:
                found.append(Refused(f"{buffer.size} bytes; a file may have {limits.max_entry_bytes}"))
            else:
                found.append(memoryview(buffer))
        return found

    return read
