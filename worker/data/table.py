"""Tables about samples as Parquet files; pyarrow is imported when one is written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from app.domain.datasets import SPLITS
from worker.recipe import Samples

if TYPE_CHECKING:
    import pyarrow as pa

MEDIA_TYPE = "application/vnd.apache.parquet"
ROWS = 8192  # in one row group, and between two signs of life


def described(samples: Samples, rows: Tensor, classes: Sequence[str]) -> "dict[str, pa.Array]":
    """Give the columns `sample`, `split` and `label` (a class name or null) of these rows of `samples`."""
    import pyarrow as pa

    labels = samples.labels[rows].tolist()
    return {
        "sample": pa.array(samples.numbers[rows].numpy()),
        "split": pa.array([SPLITS[number] for number in samples.split[rows].tolist()], pa.string()),
        "label": pa.array([classes[label] if label >= 0 else None for label in labels], pa.string()),
    }


def vectors(values: Tensor) -> "pa.Array":
    """Give [n, d] as a column of fixed-size lists of float32 (int64 stays)."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[1])


def column(values: Tensor) -> "pa.Array":
    """Give [n] as a column."""
    import pyarrow as pa

    return pa.array(values.numpy())


def write(path: Path, rows: int, columns: "Callable[[slice], Mapping[str, Any]]", tick: Callable[[int], None]) -> None:
    """Write a table piece by piece, so that no more than a piece of it is in memory.

    Args:
        columns: gives the columns of a slice of the rows.
        tick: is told how many rows are written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    try:
        for start in range(0, max(rows, 1), ROWS):  # a table without rows has its columns too
            table = pa.table(dict(columns(slice(start, min(start + ROWS, rows)))))
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            tick(min(start + ROWS, rows))
    finally:
        if writer is not None:
            writer.close()
