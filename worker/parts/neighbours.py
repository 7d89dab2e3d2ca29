"""Who lies next to whom in an embedding: exact searches as matrix products of pieces, in bounded memory.

Every search is by cosine similarity of rows from a common origin: no n x n matrix is ever held, and rows may lie in a
memory map beside the device that multiplies them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, BANK = 1024, 16384  # rows that are compared at once: 64 MiB of similarities
GATHERED = 2**24  # numbers fetched at once to measure distances

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Nearest:
    """The nearest rows of a bank for each query, the nearest first."""

    similarity: Tensor  # float32 [m, k]
    index: Tensor  # int64 [m, k], rows of the bank


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, first < second, the most similar first."""

    first: Tensor  # int64 [p]
    second: Tensor  # int64 [p]
    similarity: Tensor  # float32 [p]
    found: int  # how many there are; p is less where only the most similar were kept


def unit(values: Tensor, device: torch.device, origin: Tensor | None = None) -> Tensor:
    """Bring rows [n, d] to length one on the device, seen from `origin` [d]."""
    values = values.to(device).float()
    return F.normalize(values if origin is None else values - origin, dim=1)


def nearest(
    queries: Tensor, bank: Tensor, k: int, device: torch.device, *, excluded: Tensor | None = None,
    origin: Tensor | None = None, tick: Tick = lambda *_: None,
) -> Nearest:  # fmt: skip
    """Find for each of `queries [m, d]` the `k` most similar rows of `bank [n, d]`; on the CPU.

    Args:
        excluded: int64 [m], a row of the bank that each query must not find (itself), or -1.
        origin: [d], where rows are looked at from; None is zero.
        tick: is told how many queries of how many are done.
    """
    similarity, index = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    for start in range(0, len(queries), QUERIES):
        tick(start, len(queries))
        asked = unit(queries[start : start + QUERIES], device, origin)
        own = excluded[start : start + QUERIES].to(device) if excluded is not None else None
        best = torch.full((len(asked), 0), 0.0, device=device)
        where = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
        for low, part in _pieces(bank, device, origin):
            found = asked @ part.T  # [rows, piece]
            if own is not None:
                inside = ((own >= low) & (own < low + len(part))).nonzero().squeeze(1)
                found[inside, own[inside] - low] = -torch.inf
            values, places = found.topk(min(k, len(part)), dim=1)
            best, where = torch.cat([best, values], 1), torch.cat([where, places + low], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, order)
        similarity[start : start + len(asked)], index[start : start + len(asked)] = best.cpu(), where.cpu()
    return Nearest(similarity, index)


def pairs_above(
    values: Tensor, least: float, device: torch.device, *, limit: int, origin: Tensor | None = None,
    tick: Tick = lambda *_: None,
) -> Pairs:  # fmt: skip
    """Find the pairs of `values [n, d]` that are at least so similar, but only the `limit` most similar of them."""
    first, second = torch.empty(2, 0, dtype=torch.int64).unbind(0)
    similarity, count = torch.empty(0), 0
    for start in range(0, len(values), QUERIES):
        tick(start, len(values))
        asked = unit(values[start : start + QUERIES], device, origin)
        rows = torch.arange(start, start + len(asked), device=device)
        for low, part in _pieces(values[start:], device, origin):
            columns = torch.arange(start + low, start + low + len(part), device=device)
            found = (asked @ part.T).masked_fill(columns[None] <= rows[:, None], -torch.inf)
            inside = found >= least
            here = int(inside.sum())
            if not here:
                continue
            count += here
            at = inside.nonzero() if here <= limit else _largest(found, limit)
            first = torch.cat([first, rows[at[:, 0]].cpu()])
            second = torch.cat([second, columns[at[:, 1]].cpu()])
            similarity = torch.cat([similarity, found[at[:, 0], at[:, 1]].cpu()])
            if len(similarity) > 2 * limit:
                kept = similarity.topk(limit)[1]
                first, second, similarity = first[kept], second[kept], similarity[kept]
    order = similarity.argsort(descending=True, stable=True)[:limit]
    return Pairs(first[order], second[order], similarity[order].clamp(max=1), count)


def distances(values: Tensor, index: Tensor, device: torch.device, origin: Tensor | None = None) -> Tensor:
    """Measure how far each row of `values [n, d]` lies from its `index [n, k]` on the unit sphere: float32 [n, k].

    From the differences themselves: the root of 2 - 2 cos would lose half of the digits where it matters most.
    """
    made: list[Tensor] = []
    rows = max(1, GATHERED // (index.shape[1] * values.shape[1]))
    for part, whose in zip(values.split(rows), index.split(rows), strict=True):
        near = unit(values[whose.flatten().to(values.device)], device, origin).unflatten(0, whose.shape)
        made.append((near - unit(part, device, origin)[:, None]).norm(dim=2).cpu())
    return torch.cat(made)


def local_outlier_factor(far: Tensor, index: Tensor) -> Tensor:
    """Give each row's local outlier factor: about 1 inside a cluster of any density, larger outside; float32 [n].

    Breunig, Kriegel, Ng, Sander: LOF, SIGMOD 2000, definitions 5 to 7. `far [n, k]` are the distances to the nearest
    rows `index [n, k]`, the nearest first.
    """
    reached = torch.maximum(far, far[:, -1][index])  # definition 5
    density = 1 / (reached.double().mean(1) + 1e-10)  # definition 6; k copies of one row have no distance
    return (density[index].mean(1) / density).float()  # definition 7


def _pieces(bank: Tensor, device: torch.device, origin: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    for low in range(0, len(bank), BANK):
        yield low, unit(bank[low : low + BANK], device, origin)


def _largest(found: Tensor, count: int) -> Tensor:
    at = found.flatten().topk(count)[1]
    return torch.stack([at // found.shape[1], at % found.shape[1]], 1)
