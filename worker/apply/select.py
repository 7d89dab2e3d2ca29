"""Which unlabelled samples to label next, so that a few labels say the most."""

import math
from typing import Any, Literal

import torch
from pydantic import Field

from app.domain.datasets import SPLITS
from app.domain.errors import UserFault
from worker.data import table
from worker.parts import pictures
from worker.parts.neighbours import unit
from worker.parts.seed import generator
from worker.parts.selection import Selected, farthest_first, typical
from worker.recipe import Context, Params, Recipe, Requires, Result, Samples, Splits

FILE, SHEET = "selected.parquet", "selected.png"
LISTED, SHOWN, COLUMNS = 200, 120, 12


class SelectParams(Params):
    """How many, by which rule."""

    count: int = Field(default=100, ge=1, le=10_000, description="How many unlabelled samples to choose.")
    method: Literal["typicality", "coreset"] = Field(
        default="typicality",
        description="`typicality`: the most typical of each cluster, best for few labels (Hacohen et al. 2022); "
        "`coreset`: what lies farthest from all labels, for many (Sener and Savarese 2018).",
    )  # fmt: skip
    neighbours: int = Field(default=20, ge=1, le=500, description="That typicality looks at, within a cluster.")
    splits: Splits = Field(default=("train",), description="Where to choose from; null is every split.")


def apply(context: Context) -> Result:
    """Write `selected.parquet` (rank, sample, split, score, cluster) and a sheet in that order.

    What has a label counts as covered; a label that the job's budget hides counts as none.
    """
    params: SelectParams = context.params
    samples = context.samples(params.splits)
    covered = samples.labels >= 0
    free = int((~covered).sum())
    if params.count > free:
        raise UserFault(
            f"params.count: {params.count} samples cannot be chosen; {free} have no label here.",
            code="too_few_unlabelled", hint="Lower count; data.labels_per_class hides labels, to try this out.",
        )  # fmt: skip
    points = unit(context.features(samples), context.device)

    def tick(done: int, total: int) -> None:
        context.tick("select", done, total)

    if params.method == "typicality":
        draws = generator(context.seed, "select")
        found = typical(points, covered, params.count, neighbours=params.neighbours, draws=draws, tick=tick)
    else:
        found = farthest_first(points, covered, params.count, tick=tick)
    _write(context, samples, found)
    numbers = samples.numbers[found.rows].tolist()
    return Result(
        result={
            "method": params.method,
            "labelled": len(samples) - free,
            "unlabelled": free,
            "selected": [
                {
                    "sample": number,
                    "split": SPLITS[int(samples.split[row])],
                    "score": None if math.isnan(score) else round(score, 4),
                }
                for number, row, score in zip(
                    numbers[:LISTED], found.rows.tolist(), found.scores.tolist(), strict=False
                )
            ],
        },
        files={FILE: table.MEDIA_TYPE, SHEET: "image/png"},
        metrics={"select/last_score": found.scores[-1].item()} if not found.scores[-1].isnan() else {},
    )


def _write(context: Context, samples: Samples, found: Selected) -> None:
    rank = torch.arange(len(found.rows))

    def columns(piece: slice) -> dict[str, Any]:
        about = table.described(samples, found.rows[piece], context.info.classes)
        del about["label"]
        return {
            "rank": table.column(rank[piece] + 1),
            **about,
            "score": table.column(found.scores[piece]),
            **({"cluster": table.column(found.clusters[piece])} if found.clusters is not None else {}),
        }

    table.write(context.scratch / FILE, len(rank), columns, lambda done: context.tick("write", done, len(rank)))
    shown = context.images(samples.numbers[found.rows[:SHOWN]])
    (context.scratch / SHEET).write_bytes(pictures.png(pictures.grid(shown, columns=COLUMNS)))


RECIPE = Recipe(
    name="select",
    kind="apply",
    version="1",
    summary="Choose the unlabelled samples whose labels would say the most.",
    tasks=("image_classification", "unlabelled_images"),
    Params=SelectParams,
    requires=Requires(min_samples=0, trained=True, fewer_than_samples=("count",), up_to_unlabelled=("count",)),
    apply=apply,
)
