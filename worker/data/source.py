"""Where training samples come from: rows of a source, a part of them, and what a run is given. Nothing here decodes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

from worker.recipe import Batch

Prepare = Callable[[Batch, Generator], Batch]


class Source(Protocol):
    """Rows that can be read in any order."""

    @property
    def labels(self) -> Tensor:
        """int64 [rows], -1 where there is no label."""
        ...

    @property
    def slow(self) -> bool:
        """Whether reading decodes, so that the next batches should be read ahead."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Give the rows of these numbers, int64 [batch]; `epoch` matters only where views of a sample are cached."""
        ...

    def numbers(self, rows: Tensor) -> Tensor:
        """Give the numbers of these rows' samples, counted over all splits: what a batch holds as "index"."""
        ...


@dataclass(frozen=True)
class Part:
    """Some rows of a source, with the labels that this run may see."""

    source: Source
    rows: Tensor  # int64 [n]
    labels: Tensor  # int64 [n]

    @property
    def slow(self) -> bool:
        """Whether reading decodes."""
        return self.source.slow

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Give the rows of these numbers within the part."""
        return {**self.source.batch(self.rows[rows], epoch), "label": self.labels[rows]}

    def numbers(self, rows: Tensor) -> Tensor:
        """Give the sample numbers of these rows."""
        return self.source.numbers(self.rows[rows])


def part(source: Source, rows: Tensor, *, hidden: Tensor | None = None) -> Part:
    """Take some rows of a source; `hidden` (bool [rows of the source]) are rows whose label this run must not see."""
    labels = source.labels[rows]
    if hidden is not None:
        labels = torch.where(hidden[rows], -1, labels)
    return Part(source, rows, labels)


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by."""

    train: Source
    validation: Source | None
    test: Source | None
    prepare: Prepare | None  # the recipe's `inputs`
    mean: Tensor  # [channels], of pixels in [0, 1]
    std: Tensor
    probe: Source | None = None  # rows of the training split, without augmentation
    # (x - mean) / std as x * scale + shift, one pass: scale, scale of bytes and shift, each [channels, 1, 1], on every
    # device that wanted them.
    _lines: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def ready(self, batch: Batch, device: torch.device, draws: Generator | None = None) -> Batch:
        """Move a batch to the device, pass it through the recipe's inputs, and normalise every image in it.

        Without `draws` (of that device) the inputs are left out. Bytes travel, floats are made on the device, from
        16-bit images before anything else.
        """
        moved = {key: carried(value, device) for key, value in batch.items()}
        moved = {key: value.float() / 65535 if value.dtype == torch.uint16 else value for key, value in moved.items()}
        if draws is not None and self.prepare is not None:
            moved = self.prepare(moved, draws)
        return {key: self._normalised(value) if key.startswith("image") else value for key, value in moved.items()}

    def _normalised(self, images: Tensor) -> Tensor:
        """Bring images to zero mean and unit deviation per channel."""
        device = images.device
        if device not in self._lines:
            with torch.inference_mode(mode=False):  # whoever needs it first
                scale, shift = (1 / self.std)[:, None, None], (-self.mean / self.std)[:, None, None]
                self._lines[device] = tuple(value.to(device) for value in (scale, scale / 255, shift))
        scale, scale_of_bytes, shift = self._lines[device]
        return torch.addcmul(shift, images.float(), scale_of_bytes if images.dtype == torch.uint8 else scale)


def carried(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for it: a GPU fetches by itself what lies in pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


def in_order(source: Source, size: int) -> Iterator[Tensor]:
    """Give the row numbers of a source in batches, the last one smaller."""
    return iter(torch.arange(len(source)).split(size))


def ahead(
    source: Source, batches: Iterator[Tensor], epoch: int = 0, *, depth: int = 3, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Batch]]:
    """Read batches in this order, a few ahead on a thread of their own where the source is slow.

    What is read ahead for a GPU is left in pinned memory.
    """

    def read(rows: Tensor) -> Batch:
        batch = source.batch(rows, epoch)
        pins = device is not None and device.type == "cuda"
        return {key: value.pin_memory() for key, value in batch.items()} if pins else batch

    if not source.slow:
        for rows in batches:
            yield rows, source.batch(rows, epoch)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting: list[tuple[Tensor, Future[Batch]]] = []
        for rows in batches:
            waiting.append((rows, pool.submit(read, rows)))
            if len(waiting) > depth:
                first, found = waiting.pop(0)
                yield first, found.result()
        for first, found in waiting:
            yield first, found.result()
