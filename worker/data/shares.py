"""The part of every batch that one of several processes computes, with the draws that a single process would make.

The inputs of most recipes draw for each sample by itself: there a process reads and augments its own samples, and each
draw is made for the whole batch and cut. Inputs that mix samples (MixUp) need them all, so every process makes the
whole batch and cuts that.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from worker.data.source import Data, Prepare
from worker.parts import distributed
from worker.parts.seed import generator
from worker.parts.tuning import Plan
from worker.recipe import Batch

LEAST = 8  # samples of one process: below, a draw for its samples cannot be told from another by its size
_BY_SIZE: tuple[Callable[..., Tensor], ...] = (torch.rand, torch.randn, torch.randint)


class Share:
    """What one process does of a run's batches.

    `without_labels` says that some batches come without labels, which the inputs may treat in another way.
    """

    def __init__(self, data: Data, plan: Plan, *, without_labels: bool = False) -> None:
        self._rank, self._world, self._accumulate = distributed.rank(), distributed.world_size(), plan.accumulate
        self._micro = plan.batch_size // plan.accumulate  # of all processes
        self._whole = (
            self._world > 1
            and data.prepare is not None
            and not self._draws_by_sample(data, without_labels=without_labels)
        )
        self._data = data
        if self._world > 1 and data.prepare is not None:
            self._data = replace(data, prepare=self._prepared(data.prepare))

    def rows(self, rows: Tensor) -> Tensor:
        """Give those of a batch's rows that this process reads, one micro-batch after another."""
        if self._world == 1 or self._whole:
            return rows
        return rows.view(self._accumulate, self._world, -1)[:, self._rank].flatten()

    def ready(self, part: Batch, device: torch.device, draws: Generator) -> Batch:
        """Do with what was read of a micro-batch as `Data.ready` does, and give what this process computes."""
        return self._data.ready(part, device, draws)

    def _prepared(self, prepare: Prepare) -> Prepare:
        if self._whole:
            return lambda batch, draws: {
                name: _cut(value, self._micro, self._rank, self._world) for name, value in prepare(batch, draws).items()
            }

        def prepared(batch: Batch, draws: Generator) -> Batch:
            with _SharedDraws(self._micro, self._rank, self._world):
                return prepare(batch, draws)

        return prepared

    def _draws_by_sample(self, data: Data, *, without_labels: bool) -> bool:
        if self._micro // self._world < LEAST:
            return False
        rows, cpu = torch.arange(min(LEAST, len(data.train))), torch.device("cpu")
        batch = {name: value.cpu() for name, value in data.train.batch(rows).items()}  # a resident set's is on the GPU
        try:
            with _SharedDraws(len(rows) * self._world, 0, self._world):
                data.ready(batch, cpu, generator(0, "trial"))
                if without_labels:
                    unlabelled = {name: value for name, value in batch.items() if name != "label"}
                    data.ready(unlabelled, cpu, generator(0, "trial"))
        except _MixesSamples:
            return False
        return True


class _MixesSamples(Exception):
    """Something was drawn that is not one number, or row of numbers, per sample."""


class _SharedDraws(TorchFunctionMode):
    """Makes every draw from a generator as for a batch of `size`, and keeps the part of one process.

    A draw for several views of each sample comes view by view, as `policy.views` lays them; a draw whose size has
    nothing to do with that of the batch is the same in all processes.
    """

    def __init__(self, size: int, rank: int, world: int) -> None:
        super().__init__()
        self._size, self._rank, self._world = size, rank, world

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if given.get("generator") is None and not any(isinstance(each, Generator) for each in args):
            return func(*args, **given)
        if func not in _BY_SIZE:
            raise _MixesSamples
        ranges, size = _split(func, args, given)
        own = self._size // self._world
        if not size or size[0] == 0 or size[0] % own:
            return func(*ranges, size, **given)
        drawn = func(*ranges, (size[0] * self._world, *size[1:]), **given)
        return _cut(drawn, self._size, self._rank, self._world)


def _split(func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[list[Any], tuple[int, ...]]:
    """Tell the arguments of a random function that are limits from those that are its size."""
    positional = list(args)
    if "size" in given:
        return positional, tuple(given.pop("size"))
    if func is torch.randint:
        return positional[:-1], tuple(positional[-1])
    size = positional[0] if positional and isinstance(positional[0], tuple | list) else positional
    return [], tuple(size)


def _cut(value: Tensor, size: int, rank: int, world: int) -> Tensor:
    """Take one process's samples out of [views * size, …]; anything else stays whole."""
    if not value.ndim or not len(value) or len(value) % size:
        return value
    return value.unflatten(0, (-1, world, size // world))[:, rank].flatten(0, 1)
