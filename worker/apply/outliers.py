"""What does not belong and what is there twice: outlier scores and near duplicates in a model's embedding."""

import json
from collections import Counter
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from app.domain.datasets import SPLITS
from worker.data import table
from worker.parts import pictures
from worker.parts.neighbours import Pairs, distances, local_outlier_factor, nearest, pairs_above
from worker.recipe import Context, Params, Recipe, Requires, Result, Samples, Splits

FILE, PAIRS, REPORT = "outliers.parquet", "duplicates.parquet", "report.json"
SHEET, PAIRS_SHEET = "outliers.png", "duplicates.png"
MOST_PAIRS = 100_000
SHOWN = 48
LISTED = 100
COMPARED = 512  # pairs whose pixels are compared at once
# Where nobody says what a pair is: as near as this part of the median distance to the nearest neighbour, because a
# model that has learnt classes draws all of one together. On 1,797 digits, none of which is there twice, after twelve
# epochs of SimCLR (seed 0): 24 pairs, and 449 from a cosine of 0.98. Of 100 copies with noise of 2 %, or with 7 % less
# light, all were pairs.
NEARER = 0.4
LEAST, MOST = 0.98, 0.9999  # of that similarity: no pair is less alike, and a copy may lose as much by rounding


class OutliersParams(Params):
    """What counts as far and what as near."""

    k: int = Field(default=20, ge=1, le=500, description="The neighbour, or the neighbourhood, that a score is by.")
    score: Literal["distance", "density"] = Field(
        default="distance",
        description="`distance` to the k-th neighbour (Ramaswamy et al. 2000), or `density`: the local outlier factor "
        "(Breunig et al. 2000), for sets whose groups differ in spread.",
    )  # fmt: skip
    duplicate_similarity: float | None = Field(
        default=None, ge=0.5, le=0.9999,
        description="Cosine of centred features from which two samples are a pair; null is 0.98, or more where half of "
        "the samples have a neighbour that is nearly so near.",
    )  # fmt: skip
    splits: Splits = Field(default=None, description="Which splits are looked at together; null is every split.")


def apply(context: Context) -> Result:
    """Write scores and pairs as Parquet, a report as JSON, and a sheet of each.

    Similarity is the cosine from the mean of all features: those of a network with rectifiers are all positive, and
    from zero every sample would look like every other.
    """
    params: OutliersParams = context.params
    samples = context.samples(params.splits)
    values, device = context.features(samples), context.device
    origin = torch.stack([part.to(device).double().sum(0) for part in values.split(table.ROWS)]).sum(0) / len(values)
    origin = origin.float()
    found = nearest(
        values, values, params.k, device, excluded=torch.arange(len(samples)), origin=origin,
        tick=lambda done, total: context.tick("neighbours", done, total),
    )  # fmt: skip
    far = distances(values, found.index, device, origin)
    far = far.sort(dim=1)[0]  # by cosine they may be a rounding out of order
    scores = far[:, -1] if params.score == "distance" else local_outlier_factor(far, found.index)
    alike = params.duplicate_similarity or pair_similarity(far)
    pairs = pairs_above(
        values, alike, device, limit=MOST_PAIRS, origin=origin,
        tick=lambda done, total: context.tick("pairs", done, total),
    )  # fmt: skip
    exact = _same_pixels(context, samples, pairs)
    _write_tables(context, samples, scores, pairs, exact)
    order = scores.argsort(descending=True, stable=True)
    report = _report(context, samples, scores, order, pairs, exact, alike)
    (context.scratch / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    files = {FILE: table.MEDIA_TYPE, PAIRS: table.MEDIA_TYPE, REPORT: "application/json", SHEET: "image/png"}
    shown = context.images(samples.numbers[order[:SHOWN]])
    (context.scratch / SHEET).write_bytes(pictures.png(pictures.grid(shown, columns=12)))
    if len(pairs.first):
        both = torch.stack([pairs.first, pairs.second], 1)[: SHOWN // 2].flatten()
        sheet = pictures.grid(context.images(samples.numbers[both]), columns=2 * min(6, len(both) // 2))
        (context.scratch / PAIRS_SHEET).write_bytes(pictures.png(sheet))
        files[PAIRS_SHEET] = "image/png"
    return Result(
        result=report,
        files=files,
        metrics={
            "outliers/median_score": scores.median().item(),
            "outliers/largest_score": scores.max().item(),
            "duplicates/pairs": float(pairs.found),
            "duplicates/leaking_pairs": float(report["duplicates"]["across_splits"]),
        },
    )


def pair_similarity(far: Tensor) -> float:
    """Choose the similarity from which two samples are a pair; `far` [n, k] are distances, the nearest first."""
    return min(max(LEAST, 1 - (NEARER * far[:, 0].median().item()) ** 2 / 2), MOST)


def _same_pixels(context: Context, samples: Samples, pairs: Pairs) -> Tensor:
    """Say which pairs are the same picture at the size that the model sees: bool [p]."""
    made: list[Tensor] = [torch.empty(0, dtype=torch.bool)]
    for first, second in zip(pairs.first.split(COMPARED), pairs.second.split(COMPARED), strict=True):
        context.tick("compare", sum(map(len, made)), len(pairs.first))
        one, other = context.images(samples.numbers[first]), context.images(samples.numbers[second])
        made.append((one == other).flatten(1).all(1))
    return torch.cat(made)


def _write_tables(context: Context, samples: Samples, scores: Tensor, pairs: Pairs, exact: Tensor) -> None:
    count = len(samples)
    rows = torch.arange(count)

    def score_columns(piece: slice) -> dict[str, Any]:
        about = table.described(samples, rows[piece], context.info.classes)
        return {**about, "score": table.column(scores[piece])}

    def pair_columns(piece: slice) -> dict[str, Any]:
        first, second = (
            table.described(samples, side[piece], context.info.classes) for side in (pairs.first, pairs.second)
        )
        return {
            **{f"first_{name}": column for name, column in first.items()},
            **{f"second_{name}": column for name, column in second.items()},
            "similarity": table.column(pairs.similarity[piece]),
            "exact": table.column(exact[piece]),
        }

    table.write(
        context.scratch / FILE, len(samples), score_columns, lambda done: context.tick("write", done, len(rows))
    )
    count = len(pairs.first)
    table.write(context.scratch / PAIRS, count, pair_columns, lambda done: context.tick("write pairs", done, count))


def _report(
    context: Context, samples: Samples, scores: Tensor, order: Tensor, pairs: Pairs, exact: Tensor, alike: float
) -> dict[str, Any]:
    crossing = samples.split[pairs.first] != samples.split[pairs.second]
    labels = samples.labels[pairs.first], samples.labels[pairs.second]
    conflicting = (labels[0] != labels[1]) & (labels[0] >= 0) & (labels[1] >= 0)
    sides = [side[crossing].tolist() for side in (samples.split[pairs.first], samples.split[pairs.second])]
    between = Counter(f"{SPLITS[one]}/{SPLITS[other]}" for one, other in zip(*sides, strict=True))

    def named(row: int) -> dict[str, Any]:
        label = int(samples.labels[row])
        return {
            "sample": int(samples.numbers[row]),
            "split": SPLITS[int(samples.split[row])],
            "label": context.info.classes[label] if label >= 0 else None,
        }

    return {
        "samples": len(samples),
        "outliers": [{**named(row), "score": round(float(scores[row]), 4)} for row in order[:LISTED].tolist()],
        "duplicates": {
            "from_similarity": round(alike, 5),
            "pairs": pairs.found,
            "exact": int(exact.sum()),
            "across_splits": int(crossing.sum()),
            "leakage": dict(between),
            "conflicting_labels": int(conflicting.sum()),
            "complete": pairs.found == len(pairs.first),
            "nearest": [
                {
                    "first": named(int(pairs.first[at])),
                    "second": named(int(pairs.second[at])),
                    "similarity": round(float(pairs.similarity[at]), 4),
                    "exact": bool(exact[at]),
                }
                for at in range(min(LISTED, len(pairs.first)))
            ],
        },
    }


RECIPE = Recipe(
    name="outliers",
    kind="apply",
    version="1",
    summary="Find samples that do not belong, and pairs of samples that are (nearly) the same, also across splits.",
    tasks=("image_classification", "unlabelled_images"),
    Params=OutliersParams,
    requires=Requires(min_samples=0, trained=True, fewer_than_samples=("k",)),
    apply=apply,
)
