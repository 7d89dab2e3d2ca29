"""Groups of samples that a model sees as alike: k-means in its embedding, for one number of clusters or the best one.

How many: the largest mean silhouette (Rousseeuw: Silhouettes, 1987) over at most 2,000 samples.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from worker.data import table
from worker.parts import pictures
from worker.parts.clustering import agreement
from worker.parts.kmeans import KMeans, kmeans
from worker.parts.neighbours import unit
from worker.parts.seed import generator
from worker.recipe import Context, Params, Recipe, Requires, Result, Samples, Splits

FILE, SHEET = "clusters.parquet", "clusters.png"
SILHOUETTE_ROWS = 2000
CLUSTERS_SHOWN, COLUMNS_SHOWN = 64, 12

Count = Annotated[int, Field(ge=2, le=10_000)]


class ClusterParams(Params):
    """How many clusters, of what."""

    clusters: Count | Annotated[tuple[Count, ...], Field(min_length=1, max_length=32)] = Field(
        default=10, description="How many, or several numbers of which the best by silhouette is taken."
    )
    starts: int = Field(default=4, ge=1, le=50, description="Runs from other starts; the least inertia is kept.")
    normalise: bool = Field(default=True, description="Scale features to length one first, so that directions count.")
    splits: Splits = Field(default=("train",), description="Which splits; null is every split.")


@dataclass(frozen=True)
class _Tried:
    """One number of clusters."""

    found: KMeans
    silhouette: float | None  # None where the looked-at samples lie in one cluster, or each in one of its own


def apply(context: Context) -> Result:
    """Write `clusters.parquet` (sample, split, label, cluster, distance) and a sheet: a row per cluster.

    The largest cluster is number 0; a row of the sheet begins with what lies nearest to the centroid.
    """
    params: ClusterParams = context.params
    samples = context.samples(params.splits)
    values = context.features(samples)
    points = unit(values, context.device) if params.normalise else values.to(context.device)
    counts = (params.clusters,) if isinstance(params.clusters, int) else params.clusters
    rows = torch.randperm(len(points), generator=generator(context.seed, "silhouette"))[:SILHOUETTE_ROWS]
    tried: dict[int, _Tried] = {}
    for number, count in enumerate(sorted(set(counts))):
        found = _best(context, points, count, params.starts, number / len(set(counts)))
        tried[count] = _Tried(found, _silhouette(points[rows.to(points.device)], found.assignment[rows]))
    chosen = max(tried, key=lambda count: (_ranked(tried[count].silhouette), -count))
    found = tried[chosen].found
    order = torch.bincount(found.assignment, minlength=chosen).argsort(descending=True, stable=True)
    renamed = torch.empty_like(order).index_copy(0, order, torch.arange(chosen, device=order.device))
    assignment, centroids = renamed[found.assignment], found.centroids[order]
    distance = torch.cat(
        [
            (part - centroids[own]).norm(dim=1)
            for part, own in zip(points.split(8192), assignment.split(8192), strict=True)
        ]
    ).cpu()
    assignment = assignment.cpu()
    _write(context, samples, assignment, distance)
    known = bool((samples.labels >= 0).any())
    agreed = agreement(assignment, samples.labels) if known else {}
    silhouette = tried[chosen].silhouette
    numbers = {"inertia": found.inertia, **({"silhouette": silhouette} if silhouette is not None else {}), **agreed}
    return Result(
        result={
            "clusters": chosen,
            "sizes": torch.bincount(assignment, minlength=chosen).tolist(),
            "tried": [
                {"clusters": count, "inertia": each.found.inertia, "silhouette": each.silhouette}
                for count, each in tried.items()
            ],
            **numbers,
            **({"classes": _classes(assignment, samples.labels, chosen, context.info.classes)} if known else {}),
        },
        files={FILE: table.MEDIA_TYPE, SHEET: "image/png"},
        metrics={f"cluster/{name}": value for name, value in numbers.items()},
    )


def _best(context: Context, points: Tensor, count: int, starts: int, fraction: float) -> KMeans:
    found: list[KMeans] = []
    begun = round(1000 * fraction)
    for start in range(starts):
        draws = generator(context.seed, "cluster", count, start)
        found.append(kmeans(points, count, generator=draws, tick=lambda *_: context.tick("cluster", begun, 1000)))
    return min(found, key=lambda each: each.inertia)


def _silhouette(points: Tensor, assignment: Tensor) -> float | None:
    from sklearn.metrics import silhouette_score

    if not 2 <= len(assignment.unique()) < len(assignment):
        return None
    return float(silhouette_score(points.cpu().numpy(), assignment.cpu().numpy()))


def _ranked(silhouette: float | None) -> float:
    return -2.0 if silhouette is None else silhouette


def _classes(assignment: Tensor, labels: Tensor, clusters: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Give the commonest class of each cluster, and its part of the cluster's labelled samples."""
    known = labels >= 0
    counts = torch.zeros(clusters, len(names), dtype=torch.int64)
    counts.index_put_((assignment[known], labels[known]), torch.ones(1, dtype=torch.int64), accumulate=True)
    made: list[dict[str, Any]] = []
    for row in counts:
        total = int(row.sum())
        made.append(
            {"label": names[int(row.argmax())], "share": round(int(row.max()) / total, 4)}
            if total
            else {"label": None, "share": None}
        )
    return made


def _write(context: Context, samples: Samples, assignment: Tensor, distance: Tensor) -> None:
    rows = torch.arange(len(samples))

    def columns(piece: slice) -> dict[str, Any]:
        return {
            **table.described(samples, rows[piece], context.info.classes),
            "cluster": table.column(assignment[piece]),
            "distance": table.column(distance[piece]),
        }

    table.write(context.scratch / FILE, len(rows), columns, lambda done: context.tick("write", done, len(rows)))
    shown: list[Tensor] = []
    for cluster in range(min(CLUSTERS_SHOWN, int(assignment.max()) + 1)):
        inside = (assignment == cluster).nonzero().squeeze(1)
        nearest = inside[distance[inside].argsort(stable=True)[:COLUMNS_SHOWN]]
        shown.append(context.images(samples.numbers[nearest]))
    (context.scratch / SHEET).write_bytes(pictures.png(pictures.sheet(shown)))


RECIPE = Recipe(
    name="cluster",
    kind="apply",
    version="1",
    summary="Group samples by k-means in a model's embedding, and say how well the groups agree with any labels.",
    tasks=("image_classification", "unlabelled_images"),
    Params=ClusterParams,
    requires=Requires(min_samples=0, trained=True, fewer_than_samples=("clusters",)),
    apply=apply,
)
