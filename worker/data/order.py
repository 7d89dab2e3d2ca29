"""Which rows each step of an epoch draws: a function of (seed, epoch), the same in every process."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Generator, Tensor, nn

from worker.parts.seed import generator
from worker.parts.tuning import Plan
from worker.recipe import Batch


def draw_order(module: nn.Module, labels: Tensor, plan: Plan, *, seed: int, epoch: int) -> Tensor:
    """Give the rows of an epoch, batch after batch: int64 [at least steps_per_epoch * batch_size].

    A permutation; with replacement where the objective has `sample_weights`; batches put together of labelled and other
    rows where it has a `labelled_part`.

    Args:
        labels: int64 [rows], -1 where there is none.
    """
    draws = generator(seed, "order", epoch)
    if hasattr(module, "labelled_part"):
        return _composed(cast(Callable[[int], float], module.labelled_part), labels, plan, epoch, draws)
    weigh = cast("Callable[[Tensor], Tensor | None] | None", getattr(module, "sample_weights", None))
    weights = weigh(labels) if weigh is not None else None
    if weights is None:
        return torch.randperm(len(labels), generator=draws)
    return torch.multinomial(weights.double().cpu(), len(labels), replacement=True, generator=draws)


def shown(module: nn.Module, step: int, batch: Batch) -> Batch:
    """Show an objective with a `labelled_part` how much of a batch has labels, or leave "label" out of one without.

    "labelled" is that part of the samples, float32 [batch], the same in every row: micro-batches may differ in it.
    """
    part_of = cast("Callable[[int], float] | None", getattr(module, "labelled_part", None))
    if part_of is None:
        return batch
    if part_of(step) > 0:
        known = (batch["label"] >= 0).float()
        return {**batch, "labelled": known.mean().repeat(len(known))}
    return {name: value for name, value in batch.items() if name != "label"}


def _composed(part_of: Callable[[int], float], labels: Tensor, plan: Plan, epoch: int, draws: Generator) -> Tensor:
    """Draw labelled and other rows, each in permutations of their own, and put every batch together."""
    size, first, labels = plan.batch_size, epoch * plan.steps_per_epoch, labels.cpu()
    pattern = torch.stack([_pattern(part_of(first + step), size) for step in range(plan.steps_per_epoch)])
    pools = {
        LABELLED: (labels >= 0).nonzero().squeeze(1),
        UNLABELLED: (labels < 0).nonzero().squeeze(1),
        ANY: torch.arange(len(labels)),
    }
    order = torch.empty_like(pattern)
    for kind, pool in pools.items():
        places = pattern == kind
        order[places] = _stream(pool, int(places.sum()), draws)
    return order.flatten()


LABELLED, UNLABELLED, ANY = range(3)


def _pattern(part: float, size: int) -> Tensor:
    """Say of which kind each place of a batch is: int64 [size].

    Labelled ones lie evenly among the others, so that micro-batches and processes get equal shares of them.
    """
    if part <= 0:
        return torch.full((size,), ANY)
    count = size if part >= 1 else min(max(round(size * part), 1), size - 1)
    place = torch.arange(size + 1) * count // size
    return torch.where(place.diff() > 0, LABELLED, UNLABELLED)


def _stream(pool: Tensor, count: int, draws: Generator) -> Tensor:
    """Give `count` rows of a pool: all of them in a random order, and again."""
    rounds = -(-count // max(len(pool), 1))
    drawn = [pool[torch.randperm(len(pool), generator=draws)] for _ in range(rounds)]
    return torch.cat([*drawn, pool[:0]])[:count]
