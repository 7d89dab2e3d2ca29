"""The rows of a dataset, read from its Arrow shards for browsing; nothing is decoded here.

A sample's number counts over all splits in the order train, validation, test. Shards are memory-mapped: reading a page
touches the label column and the rows of that page, whatever the size of the dataset.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.domain.errors import NotFound
from app.store import tables

if TYPE_CHECKING:
    import pyarrow

Locate = Callable[[str], Path]  # from a digest to a local file
Size = Literal["thumbnail", "original"]


@dataclass(frozen=True)
class Sample:
    """One row."""

    number: int
    split: str
    label: int | None
    path: str | None


@dataclass(frozen=True)
class Wanted:
    """Which samples: at most `limit` beyond the number `after`. `label` None is all, -1 the unlabelled ones."""

    limit: int
    after: int | None = None
    split: str | None = None
    label: int | None = None


def read(shards: Sequence[tables.Shard], locate: Locate, wanted: Wanted) -> tuple[list[Sample], bool]:
    """Give one page of samples, and whether more follow."""
    found: list[Sample] = []
    begin = 0 if wanted.after is None else wanted.after + 1
    first = 0
    for shard in shards:
        start = max(begin - first, 0)
        if start < shard.rows and wanted.split in (None, shard.split):
            for sample in _scan(_open(locate(shard.sha256)), shard.split, first, start, wanted.label):
                if len(found) == wanted.limit:
                    return found, True
                found.append(sample)
        first += shard.rows
    return found, False


def _scan(table: "pyarrow.Table", split: str, first: int, start: int, label: int | None) -> Iterator[Sample]:
    column = table.column("label") if "label" in table.column_names else None
    for row in _rows(column, table.num_rows, start, label):
        image: Any = table.column("image").slice(row, 1).combine_chunks()
        yield Sample(
            number=first + row, split=split, label=None if column is None else column[row].as_py(),
            path=image.field("path")[0].as_py(),
        )  # fmt: skip


def _rows(column: Any, rows: int, start: int, label: int | None) -> Iterator[int]:
    if label is None or (column is None and label == -1):
        return iter(range(start, rows))
    if column is None:
        return iter(())
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made at import, so no type checker knows them

    labels = column.slice(start)
    wanted = compute.is_null(labels) if label == -1 else compute.equal(labels, label)
    indices: Any = compute.indices_nonzero(wanted)
    return (start + index.as_py() for index in indices)


def picture(shards: Sequence[tables.Shard], locate: Locate, number: int, size: Size) -> bytes:
    """Give the encoded bytes of one sample's image, as they were uploaded, or of its thumbnail.

    Raises:
        NotFound: there is no such sample, or it has no thumbnail.
    """
    first = 0
    for shard in shards:
        if first <= number < first + shard.rows:
            return _picture(shard, locate, number - first, size)
        first += shard.rows
    raise NotFound(f"This dataset has the samples 0 to {first - 1}.", code="no_such_sample")


def _picture(shard: tables.Shard, locate: Locate, row: int, size: Size) -> bytes:
    if size == "original":
        image: Any = _open(locate(shard.sha256)).column("image").slice(row, 1).combine_chunks()
        data: bytes | None = image.field("bytes")[0].as_py()
    elif shard.thumbnails_sha256 is not None:
        data = _open(locate(shard.thumbnails_sha256)).column("thumbnail")[row].as_py()
    else:
        data = None
    if data is None:
        raise NotFound(f"This sample has no {size} picture.", code="no_picture")
    return data


def _open(path: Path) -> "pyarrow.Table":
    import pyarrow  # 60 MB that only browsing needs

    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all()
