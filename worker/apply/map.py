"""A picture of a whole dataset: its embedding brought to two dimensions, one disc per sample."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from app.domain.datasets import SPLITS
from app.domain.errors import UserFault
from worker.data import table
from worker.parts import pictures
from worker.parts.kmeans import kmeans
from worker.parts.neighbours import unit
from worker.parts.projection import principal_components
from worker.parts.seed import derive, generator
from worker.recipe import Context, Params, Recipe, Requires, Result, Samples, Splits

FILE, PICTURE = "map.parquet", "map.png"
BEFORE_TSNE = 50  # principal components that t-SNE starts from (van der Maaten, Hinton 2008, section 4.2)
FEWEST_FOR_TSNE = 8


class MapParams(Params):
    """How to flatten, what to show and how to colour it."""

    method: Literal["pca", "tsne"] = Field(
        default="tsne", description="`pca`: the two axes of largest variance; `tsne`: who is near whom (slower)."
    )
    samples: int = Field(
        default=2000, ge=2, le=10_000, description="At most so many samples are shown, drawn by the seed."
    )
    perplexity: float = Field(
        default=30.0, gt=1, le=500, description="Of t-SNE: about how many neighbours each point minds."
    )
    colour: Literal["auto", "label", "cluster", "split"] = Field(
        default="auto", description="What a colour means; `auto` is the label, or the cluster where there is no label."
    )
    clusters: int = Field(default=10, ge=2, le=100, description="How many, where colours mean clusters.")
    splits: Splits = Field(default=None, description="Which splits; null is every split.")


def apply(context: Context) -> Result:
    """Write `map.png` and its points as `map.parquet`: sample, split, label, x, y, group."""
    params: MapParams = context.params
    samples = context.samples(params.splits)
    rows = torch.randperm(len(samples), generator=generator(context.seed, "map"))[: params.samples].sort()[0]
    if params.method == "tsne" and len(rows) < FEWEST_FOR_TSNE:
        raise UserFault(
            f"params.method: t-SNE needs at least {FEWEST_FOR_TSNE} samples; there are {len(rows)}. Use pca.",
            code="too_few_samples",
        )
    points = unit(context.features(samples)[rows], context.device)
    groups, names = _groups(context, params, samples, rows, points)
    context.tick("flatten", 0, 1)
    flat, explained = _flattened(params, points, derive(context.seed, "tsne") % 2**31)
    context.tick("draw", 0, 1)

    def columns(piece: slice) -> dict[str, Any]:
        group = groups[piece]
        return {
            **table.described(samples, rows[piece], context.info.classes),
            "x": table.column(flat[piece, 0]),
            "y": table.column(flat[piece, 1]),
            "group": table.column(group),
        }

    table.write(context.scratch / FILE, len(rows), columns, lambda done: context.tick("write", done, len(rows)))
    (context.scratch / PICTURE).write_bytes(pictures.png(pictures.scatter(flat, groups)))
    sizes = torch.bincount(groups[groups >= 0], minlength=len(names)).tolist()
    shades = [pictures.hexadecimal(colour) for colour in pictures.colours(len(names))]
    return Result(
        result={
            "samples": len(rows),
            "method": params.method,
            "explained_variance": explained,
            "legend": [
                {"group": name, "colour": shade, "samples": size}
                for name, shade, size in zip(names, shades, sizes, strict=True)
            ],
        },
        files={PICTURE: "image/png", FILE: table.MEDIA_TYPE},
    )


def _groups(
    context: Context, params: MapParams, samples: Samples, rows: Tensor, points: Tensor
) -> tuple[Tensor, Sequence[str]]:
    """Give the group of each shown sample, int64 [rows] with -1 for none, and the groups' names."""
    labels = samples.labels[rows]
    kind = params.colour
    if kind == "auto":
        kind = "label" if bool((labels >= 0).any()) else "cluster"
    if kind == "label":
        return labels, context.info.classes
    if kind == "split":
        return samples.split[rows], SPLITS
    count = min(params.clusters, max(1, len(points) // 2))
    draws = generator(context.seed, "cluster")
    found = kmeans(points, count, generator=draws, tick=lambda done, total: context.tick("cluster", done, total))
    return found.assignment.cpu(), [f"cluster {number}" for number in range(count)]


def _flattened(params: MapParams, points: Tensor, seed: int) -> tuple[Tensor, float | None]:
    """Bring points [n, d] to float32 [n, 2] on the CPU; of PCA also the part of the variance that is left."""
    width = min(points.shape[1], len(points))
    found = principal_components(points, min(2 if params.method == "pca" else BEFORE_TSNE, width), points.device)
    few = found.apply(points).cpu()
    if params.method == "pca":
        missing = 2 - few.shape[1]
        return torch.nn.functional.pad(few, (0, missing)), float(found.explained.sum())
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(params.perplexity, (len(few) - 1) / 3)
    with threadpool_limits(torch.get_num_threads()):
        made: np.ndarray = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(few.numpy())
    return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32)), None


RECIPE = Recipe(
    name="map",
    kind="apply",
    version="1",
    summary="Draw a dataset as a model sees it: one disc per sample, alike samples near each other.",
    tasks=("image_classification", "unlabelled_images"),
    Params=MapParams,
    requires=Requires(min_samples=0, trained=True, where={"method": {"tsne": {"min_samples": FEWEST_FOR_TSNE}}}),
    apply=apply,
)
