"""Arrays on the shelf: reserved, filled and mapped in one way, whatever they hold."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from app.domain.errors import ResourceFault
from worker.data.shelf import Entry, NoRoom, Shelf
from worker.disk import amount
from worker.parts import machine

MEMORY_PART = 4  # what has no room on the shelf may take this part of the memory, all processes of a run together


@dataclass(frozen=True)
class Array:
    """What one array of an entry is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def total_bytes(arrays: Mapping[str, Array]) -> int:
    """Give what arrays take together."""
    return sum(array.nbytes for array in arrays.values())


def cached_rows(
    shelf: Shelf, key: str, arrays: Mapping[str, Array], fill: Callable[[dict[str, Tensor]], None],
    tick: Callable[[int], None], *, processes: int = 1,
) -> tuple[dict[str, Tensor], bool]:  # fmt: skip
    """Give the arrays of an entry, mapped from disk, and whether `fill` had to make them.

    What has no room on the shelf is made in memory, where it takes little of it: the same values, for this run alone.

    Args:
        tick: a sign of life while another process makes them; called with a number that grows.
        processes: of this run, each of which would hold them in its own memory.

    Raises:
        ResourceFault: there is no room on the disk, nor in memory.
    """
    try:
        return mapped_rows(shelf, key, arrays, fill, tick)
    except NoRoom as short:
        needed = total_bytes(arrays)
        if needed > machine.memory_bytes() // MEMORY_PART // processes:
            raise ResourceFault(
                f"{amount(needed)} are to be kept on disk, and {short}.", code="disk_full",
                hint="Free space on the worker, or change TUNEYARD_CACHE_BYTES, then /retry.",
            ) from short  # fmt: skip
    made = {name: torch.empty(array.shape, dtype=array.dtype) for name, array in arrays.items()}
    fill(made)
    return made, True


def mapped_rows(
    shelf: Shelf, key: str, arrays: Mapping[str, Array], fill: Callable[[dict[str, Tensor]], None],
    tick: Callable[[int], None],
) -> tuple[dict[str, Tensor], bool]:  # fmt: skip
    """Do as `cached_rows` does, without memory as a way out.

    Raises:
        NoRoom: the shelf or its disk does not hold them.
    """

    def make(folder: Path) -> None:
        fill({name: _mapped(folder / name, array, "r+") for name, array in arrays.items()})

    waits = count(1)
    sizes = {name: array.nbytes for name, array in arrays.items()}
    entry = shelf.get(key, sizes, make, waiting=lambda: tick(next(waits)))
    # Copy on write: torch wants memory that could be written, and nobody ever writes.
    return {name: _mapped(entry.folder / name, array, "c", entry) for name, array in arrays.items()}, entry.made


def _mapped(path: Path, array: Array, mode: Literal["c", "r+"], entry: Entry | None = None) -> Tensor:
    """Map an array from a file; the entry that it belongs to is in use as long as anything reads that memory."""
    if not array.nbytes:
        return torch.empty(array.shape, dtype=array.dtype)
    mapped = np.memmap(path, np.uint8, mode, shape=(array.nbytes,))
    if entry is not None:
        entry.lasts_with(mapped)
    return torch.from_numpy(mapped).view(array.dtype).view(array.shape)
