"""Which samples to label next: the most typical of every group, or those that leave nothing far away."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from worker.parts.kmeans import kmeans
from worker.parts.neighbours import nearest

MOST_CLUSTERS = 500  # Hacohen et al., section 3: more make them too small to be typical of
STARTS = 4  # of k-means, of which the best is kept
FEWEST_ROWS = 5  # a smaller cluster is passed over while there are larger ones

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Selected:
    """Rows in the order in which they were chosen."""

    rows: Tensor  # int64 [count]
    scores: Tensor  # float32 [count]; what it means depends on the method
    clusters: Tensor | None = None  # int64 [count], where the method has any


def typical(
    points: Tensor, covered: Tensor, count: int, *, neighbours: int, draws: Generator, tick: Tick = lambda *_: None
) -> Selected:
    """Choose the most typical row of each of the largest clusters that have no label yet; scores are typicality.

    TypiClust: Hacohen, Dekel, Weinshall: Active Learning on a Budget, 2022, algorithm 1. There are as many clusters as
    labels before and after, at most 500; one with fewer labels comes first, of those the largest. Typicality is the
    inverse of the mean distance to the nearest rows of the same cluster (equation 1), at most `neighbours` of them and
    at most half of the cluster.

    Args:
        points: [n, d], of length one.
        covered: bool [n], rows that have a label.
    """
    clusters = max(1, min(int(covered.sum()) + count, MOST_CLUSTERS, len(points) - 1))
    found = [kmeans(points, clusters, generator=draws, tick=tick) for _ in range(STARTS)]
    assignment = min(found, key=lambda each: each.inertia).assignment.cpu()
    labels = torch.bincount(assignment[covered], minlength=clusters)
    free = torch.bincount(assignment[~covered], minlength=clusters)
    sizes = labels + free
    ranked: dict[int, tuple[Tensor, Tensor]] = {}
    rows: list[int] = []
    scores: list[float] = []
    taken = torch.zeros(clusters, dtype=torch.int64)  # of the free rows
    for done in range(count):
        tick(done, count)
        open_ = free > taken
        large = open_ & (sizes >= FEWEST_ROWS)
        among = (large if bool(large.any()) else open_).nonzero().squeeze(1)
        fewest = among[(labels + taken)[among] == (labels + taken)[among].min()]
        cluster = int(fewest[sizes[fewest].argmax()])
        if cluster not in ranked:
            inside = (assignment == cluster).nonzero().squeeze(1)
            typicality = _typicality(points, inside, neighbours)
            candidates = ~covered[inside]
            order = typicality[candidates].argsort(descending=True, stable=True)
            ranked[cluster] = inside[candidates][order], typicality[candidates][order]
        where, how = ranked[cluster]
        rows.append(int(where[taken[cluster]]))
        scores.append(float(how[taken[cluster]]))
        taken[cluster] += 1
    chosen = torch.tensor(rows)
    return Selected(chosen, torch.tensor(scores), assignment[chosen])


def _typicality(points: Tensor, inside: Tensor, neighbours: int) -> Tensor:
    """Give the typicality of each row of a cluster (equation 1): float32 [rows]."""
    k = min(neighbours, len(inside) // 2)
    if k == 0:
        return torch.zeros(len(inside))
    own = points[inside.to(points.device)]
    found = nearest(own, own, k, points.device, excluded=torch.arange(len(own)))
    distances = (2 - 2 * found.similarity).clamp(min=0).sqrt()
    return 1 / (distances.mean(1) + 1e-5)


def farthest_first(points: Tensor, covered: Tensor, count: int, *, tick: Tick = lambda *_: None) -> Selected:
    """Choose, one by one, the row that lies farthest from all that is covered; scores are that distance.

    k-center greedy: Sener, Savarese: Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018,
    algorithm 1. Its largest remaining distance is at most twice the least possible. Where nothing is covered yet, the
    first is the row nearest to the mean, with a score of nan.

    Args:
        points: [n, d], of length one.
        covered: bool [n], rows that have a label.
    """
    device = points.device
    rows: list[int] = []
    scores: list[float] = []
    if bool(covered.any()):
        closest = 2 - 2 * nearest(points, points[covered.to(device)], 1, device).similarity.squeeze(1).to(device)
    else:
        first = int((points @ points.mean(0)).argmax())
        rows, scores = [first], [float("nan")]
        closest = 2 - 2 * (points @ points[first])
    closest = closest.clamp(min=0)
    closest[covered.to(device)] = -1
    closest[rows] = -1
    while len(rows) < count:
        if len(rows) % 16 == 0:
            tick(len(rows), count)
        far = int(closest.argmax())
        rows.append(far)
        scores.append(float(closest[far].sqrt()))
        closest = torch.minimum(closest, (2 - 2 * (points @ points[far])).clamp(min=0))
        closest[far] = -1
    return Selected(torch.tensor(rows), torch.tensor(scores))
