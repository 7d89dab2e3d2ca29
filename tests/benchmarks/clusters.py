"""k-means: ours against scikit-learn's, from the same start. `python -m tests.benchmarks.clusters '{…}'` runs both."""

import json
import sys
import time
from typing import Any

from tests.benchmarks.pairs import Bench, Numbers, Pair, workload
from tests.benchmarks.sides import THREADS, run

POINTS, WIDTH, CLUSTERS, ITERATIONS = 50_000, 512, 100, 20


@workload("kmeans_50k_512_100", "s", 1, "time", quality="loss")
def kmeans(bench: Bench) -> Pair:
    """k-means of 50k x 512 features, k = 100, 20 iterations, one start, against scikit-learn; quality: inertia."""
    return _against(bench, "features")


@workload("kmeans_blobs_50k_512_100", "s", 1, "time", quality="loss")
def kmeans_of_blobs(bench: Bench) -> Pair:
    """The same of well separated blobs, where few points move after the first iterations."""
    return _against(bench, "blobs")


def _against(bench: Bench, points: str) -> Pair:
    found = run("clusters", {"seed": bench.seed, "threads": THREADS, "points": points})[-1]
    quality = (found["our_inertia"], found["other_inertia"])
    return Pair(found["ours"], found["other"], quality, more={"inertia_ratio": quality[0] / quality[1]})


def _points(kind: str, draws: Any) -> Any:
    import torch

    if kind == "blobs":  # each 32 of its own deviations away from the next
        centres = torch.randn(CLUSTERS, WIDTH, generator=draws)
        return centres[torch.randint(CLUSTERS, (POINTS,), generator=draws)] + torch.randn(
            POINTS, WIDTH, generator=draws
        )
    # Features lie in groups of many sizes, not evenly: a mixture of twice as many clusters, after a ReLU.
    centres = torch.randn(2 * CLUSTERS, WIDTH, generator=draws)
    group = torch.randint(2 * CLUSTERS, (POINTS,), generator=draws)
    return (centres[group] + 2 * torch.randn(POINTS, WIDTH, generator=draws)).relu_()


def _measure(asked: Numbers) -> Numbers:
    import torch
    from sklearn.cluster import KMeans

    from worker.parts.kmeans import kmeans as ours  # pyright: ignore

    theirs: Any = KMeans  # its stubs know less than it
    torch.set_num_threads(asked["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draws = torch.Generator().manual_seed(asked["seed"])
    points = _points(asked["points"], draws)
    start = points[torch.randperm(POINTS, generator=draws)[:CLUSTERS]].clone()
    there = points.to(device)
    few = there[:5000]  # both are warmed up
    ours(few, CLUSTERS, generator=draws, iterations=1, start=start.to(device))
    theirs(CLUSTERS, init=start.numpy(), n_init=1, max_iter=1).fit(few.cpu().numpy())
    begun = time.perf_counter()
    mine = ours(there, CLUSTERS, generator=draws, iterations=ITERATIONS, tolerance=0.0, start=start.to(device))
    between = time.perf_counter()
    other = theirs(CLUSTERS, init=start.numpy(), n_init=1, max_iter=ITERATIONS, tol=0.0).fit(points.numpy())
    ended = time.perf_counter()
    inertia = other.inertia_
    assert inertia is not None
    return {
        "ours": between - begun, "other": ended - between, "our_inertia": mine.inertia, "other_inertia": float(inertia),
        "our_iterations": mine.iterations, "other_iterations": int(other.n_iter_),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
