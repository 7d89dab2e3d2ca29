"""k-means where the points are, on a CPU or a GPU: greedy k-means++, then Lloyd's iterations.

Arthur, Vassilvitskii: k-means++, 2007; greedy, with the 2 + log k trials per centroid that scikit-learn has. The
distances of one chunk of points to all centroids are one matrix product, in bfloat16 where the hardware multiplies it,
around zero. Rounded so, points between two centroids of one blob fall to either side and go on doing so: on a CPU the
product is float32 from when few points move, and the last assignment and the inertia are so everywhere. Nothing is read
back within an iteration on a GPU, so a cluster that lost its points is refilled without asking whether there is one:
from the points that are farthest from their centroids.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from app.domain.errors import UserFault
from worker.parts.machine import has_bfloat16, onednn_is_exact

CHUNK = {"cpu": 2**19, "cuda": 2**26}  # numbers that are worked on at once: what a core's cache holds; 256 MiB
FAST_FROM = 2**26  # products of one iteration; below, another copy of the points is not worth making
EXACT_FROM = 20  # on a CPU float32 is used when less than one point in so many moves
LOOK_EVERY = 8  # iterations between two looks at a GPU's result, each of which waits for it
SEED_ROWS_PER_CLUSTER, SEED_ROWS = 64, 2**14  # points that k-means++ looks at


@dataclass(frozen=True)
class KMeans:
    """Clusters of points [n, d]. No cluster is empty."""

    centroids: Tensor  # float32 [k, d]
    assignment: Tensor  # int64 [n], the nearest centroid of each point
    inertia: float  # sum of squared distances to the nearest centroids
    iterations: int  # Lloyd's, that were done


@torch.no_grad()
def kmeans(
    points: Tensor, k: int, *, generator: Generator, iterations: int = 100, tolerance: float = 1e-4,
    start: Tensor | None = None, tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> KMeans:  # fmt: skip
    """Find `k` clusters; the same ones for the same generator (on a GPU as far as its products repeat).

    Args:
        points: float [n, d]. A second copy of half the size may be made; the rest is small.
        generator: of any device; nothing is drawn from it where `start` is given.
        iterations: at most this many.
        tolerance: stop when the centroids moved less than this (squared, all together) in units of the mean variance
            of a coordinate, as in scikit-learn. 0 goes on until nothing moves.
        start: [k, d], centroids to begin with in place of k-means++.
        tick: called now and then, with how many of how many centroids or iterations are done.

    Raises:
        UserFault: fewer points, or distinct points, than clusters; k below 1; points that are not finite.
    """
    points = points.detach().float().contiguous()
    count, width = points.shape
    _refuse(k, count)
    if start is not None and start.shape != (k, width):
        raise ValueError(f"start is {tuple(start.shape)} and should be {(k, width)}")
    with torch.autocast(points.device.type, enabled=False), _products(points.device):
        mean = points.mean(0)
        spread = _lengths(points, mean)
        variance = spread.mean() / width
        if not bool(variance.isfinite()):
            raise UserFault("The points to be clustered are not all finite numbers.", code="not_finite")
        exact = _Table(points, mean, mean, spread)
        table = _fast(exact) if count * width * k >= FAST_FROM and _multiplies_bfloat16(points.device) else exact
        centroids = seeds(points, k, generator=generator, tick=tick) if start is None else start.to(points)
        limit, done, settled = tolerance * variance, 0, False
        assignment = torch.full((count,), -1, device=points.device)
        while done < iterations:
            tick(done, iterations)
            before, (assignment, distances) = assignment, _nearest(table, centroids)
            moved, empty = _means(points, assignment, distances, k)
            shift, centroids = (moved - centroids).square().sum(), moved
            done += 1
            if points.device.type != "cpu":
                if done % LOOK_EVERY == 0 and bool(shift <= limit):
                    break
            elif table is exact:
                if bool(shift <= limit):
                    settled = not bool(shift) and not bool(empty.any())
                    break
            elif bool(shift <= limit) or EXACT_FROM * int((assignment != before).sum()) < count:
                table = exact
        if not settled:
            centroids, assignment = _settled(exact, centroids)
        inertia = torch.zeros((), dtype=torch.float64, device=points.device)
        for part, where in zip(_chunks(points, width), _chunks(assignment, width), strict=True):
            inertia += (part - centroids[where]).square_().sum()
    return KMeans(centroids, assignment, inertia.item(), done)


@torch.no_grad()
def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Give the nearest of `centroids` [k, d] for each of `points` [n, d]: int64 [n], and the squared distances [n]."""
    points, centroids = points.detach().float().contiguous(), centroids.float()
    with torch.autocast(points.device.type, enabled=False), _products(points.device, exact=True):
        mean = centroids.mean(0)
        assignment, distances = _nearest(_Table(points, mean, mean, _lengths(points, mean)), centroids)
    return assignment, distances.clamp(min=0)


@torch.no_grad()
def seeds(
    points: Tensor, k: int, *, generator: Generator, tick: Callable[[int, int], None] = lambda _done, _total: None
) -> Tensor:
    """Choose `k` of `points` [n, d] by greedy k-means++ to begin with: [k, d].

    Of many points a random part is looked at, 64 per cluster as long as that is no more than 16,384, but 4 at least.
    """
    device = points.device
    rows = min(len(points), max(4 * k, min(SEED_ROWS_PER_CLUSTER * k, SEED_ROWS)))
    if rows < len(points):
        chosen = torch.randperm(len(points), generator=generator, device=generator.device)[:rows]
        points = points[chosen.to(device)]
    trials = 2 + int(math.log(k))
    first = torch.randint(rows, (1,), generator=generator, device=generator.device).to(device)
    draws = torch.rand(k, trials, generator=generator, device=generator.device).to(device)
    centred = points - points.mean(0)
    lengths = centred.square().sum(1)
    closest = (lengths + lengths[first] - 2 * (centred @ centred[first].T).squeeze(1)).clamp_(min=0)  # [rows]
    closest.index_fill_(0, first, 0)  # what rounding left
    found = [first]
    for draw in draws[1:]:
        tick(len(found), k)
        # With a chance that is proportional to the squared distance from the nearest centroid so far.
        total = closest.cumsum(0, dtype=torch.float64)
        tried = torch.searchsorted(total, draw * total[-1]).clamp_(max=rows - 1)  # [trials]
        distances = torch.addmm(lengths[tried][:, None] + lengths, centred[tried], centred.T, alpha=-2).clamp_(min=0)
        distances = torch.minimum(distances, closest)  # [trials, rows]
        best = distances.sum(1).argmin(keepdim=True)
        closest = distances[best].squeeze(0).index_fill_(0, tried[best], 0)
        found.append(tried[best])
    return points[torch.cat(found)].clone()


@dataclass(frozen=True)
class _Table:
    """Points in the form in which they are multiplied."""

    values: Tensor  # [n, d]: the points less `mean`, plus `offset`
    mean: Tensor  # [d]
    offset: Tensor  # [d]
    spread: Tensor  # float32 [n], squared distances to the mean


def _fast(exact: _Table) -> _Table:
    """Make a bfloat16 copy, around zero, where its eight bits go furthest."""
    values = torch.empty_like(exact.values, dtype=torch.bfloat16)
    width = values.shape[1]
    for part, into in zip(_chunks(exact.values, width), _chunks(values, width), strict=True):
        into.copy_(part - exact.mean)
    return _Table(values, exact.mean, torch.zeros_like(exact.mean), exact.spread)


def _nearest(table: _Table, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Give the nearest centroid of every point, and the squared distance (which rounding may leave just below 0)."""
    # |x - c|^2 = |x - m|^2 - 2 ((x - m) (c - m) - |c - m|^2 / 2): the largest bracket is the nearest centroid.
    moved = centroids - table.mean
    bias = moved @ table.offset + moved.square().sum(1) / 2
    matrix = moved.to(table.values.dtype).T
    assignment = torch.empty(len(table.values), dtype=torch.int64, device=centroids.device)
    distances = torch.empty_like(table.spread)
    parts = (_chunks(each, len(centroids)) for each in (table.values, table.spread, assignment, distances))
    for values, spread, where, distance in zip(*parts, strict=True):
        score, index = (values @ matrix).float().sub_(bias).max(1)
        where.copy_(index)
        torch.sub(spread, score, alpha=2, out=distance)
    return assignment, distances


def _means(points: Tensor, assignment: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the means of the clusters [k, d], farthest points in place of those that are empty, and which were: [k]."""
    # Summing sorted rows takes half the time of `index_add_`, and always has the same order.
    clusters, order = assignment.sort(stable=True)
    bounds = torch.searchsorted(clusters, torch.arange(k + 1, device=points.device))
    means = F.embedding_bag(order, points, bounds[:-1].contiguous(), mode="mean")
    empty = bounds[1:] == bounds[:-1]
    farthest = distances.topk(k).indices
    spare = points[farthest[(empty.cumsum(0) - 1).clamp_(min=0)]]  # the n-th empty cluster gets the n-th farthest point
    return torch.where(empty[:, None], spare, means), empty


def _settled(exact: _Table, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Assign every point in float32; refill what is empty then, as long as that leaves fewer clusters empty."""
    k, before = len(centroids), len(centroids) + 1
    with _products(centroids.device, exact=True):
        while True:
            assignment, distances = _nearest(exact, centroids)
            moved, empty = _means(exact.values, assignment, distances, k)
            missing = int(empty.sum())
            if not missing:
                return centroids, assignment
            if missing >= before:
                raise UserFault(
                    f"{k} clusters need as many distinct points; among these {len(assignment)} only {k - missing} can "
                    "be told apart.", code="too_few_distinct_points", hint="Ask for fewer clusters.",
                )  # fmt: skip
            before, centroids = missing, torch.where(empty[:, None], moved, centroids)


def _lengths(points: Tensor, mean: Tensor) -> Tensor:
    """Give the squared distances to the mean, [n]."""
    return torch.cat([(part - mean).square_().sum(1) for part in _chunks(points, points.shape[1])])


def _chunks(values: Tensor, per_row: int) -> tuple[Tensor, ...]:
    return values.split(max(1, CHUNK.get(values.device.type, 2**22) // per_row))


def _refuse(k: int, count: int) -> None:
    if k < 1:
        raise UserFault(f"At least one cluster is needed; {k} were asked for.", code="too_few_clusters")
    if k > count:
        raise UserFault(
            f"{k} clusters need at least {k} points; there are {count}.", code="too_few_points",
            hint=f"Ask for at most {count} clusters.",
        )  # fmt: skip


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and has_bfloat16()


@contextmanager
def _products(device: torch.device, *, exact: bool = False) -> Iterator[None]:
    """Have float32 products from oneDNN on a CPU where it does not round them; keep a GPU's from TF32 where `exact`."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu" and onednn_is_exact():
        torch.set_float32_matmul_precision("medium")
    elif device.type == "cuda" and exact:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
