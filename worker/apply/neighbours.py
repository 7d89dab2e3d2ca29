"""The nearest samples of some or of all samples of a dataset, in a model's embedding."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from app.domain.datasets import SPLITS
from app.domain.errors import UserFault
from worker.data import table
from worker.parts import pictures
from worker.parts.neighbours import Nearest, nearest
from worker.recipe import Context, Params, Recipe, Requires, Result, Samples, Splits

FILE, SHEET = "neighbours.parquet", "neighbours.png"
ROWS_SHOWN, COLUMNS_SHOWN = 24, 12
LISTED = 100  # samples whose neighbours stand in the job's result too


class NeighboursParams(Params):
    """Whose neighbours, and among whom."""

    k: int = Field(default=10, ge=1, le=1000, description="How many neighbours of each sample.")
    samples: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, max_length=10_000,
        description="Numbers of the samples to ask for, as the dataset lists them; null is all of the splits.",
    )  # fmt: skip
    splits: Splits = Field(default=None, description="Where neighbours are looked for; null is every split.")


def apply(context: Context) -> Result:
    """Write `neighbours.parquet` (sample, split, label, neighbours, similarity), and a sheet with samples first."""
    params: NeighboursParams = context.params
    everything = context.samples(None)
    asked = _asked(params, everything)
    bank = context.samples(params.splits)
    place = torch.full((len(everything),), -1).index_copy(0, bank.numbers, torch.arange(len(bank)))
    queries = everything if params.samples is not None else bank
    rows = asked if params.samples is not None else torch.arange(len(bank))
    found = nearest(
        context.features(queries)[rows], context.features(bank), params.k, context.device,
        excluded=place[queries.numbers[rows]],
        tick=lambda done, total: context.tick("search", done, total),
    )  # fmt: skip
    return _written(context, queries, rows, bank, found, listed=params.samples is not None)


def _asked(params: NeighboursParams, everything: Samples) -> Tensor:
    """Give the rows that are asked for; sample n is row n of all."""
    wrong = [number for number in params.samples or () if number >= len(everything)]
    if wrong:
        raise UserFault(
            f"params.samples: there is no sample {wrong[0]}; the dataset numbers them 0 to {len(everything) - 1}.",
            code="no_such_sample",
        )
    return torch.tensor(params.samples or (), dtype=torch.int64)


def _written(
    context: Context, queries: Samples, rows: Tensor, bank: Samples, found: Nearest, *, listed: bool
) -> Result:
    numbers = bank.numbers[found.index]  # [m, k]

    def columns(piece: slice) -> dict[str, object]:
        return {
            **table.described(queries, rows[piece], context.info.classes),
            "neighbours": table.vectors(numbers[piece]),
            "similarity": table.vectors(found.similarity[piece]),
        }

    table.write(context.scratch / FILE, len(rows), columns, lambda done: context.tick("write", done, len(rows)))
    shown = torch.linspace(0, len(rows) - 1, min(ROWS_SHOWN, len(rows))).round().long()
    sheet = pictures.sheet(
        [context.images(torch.cat([queries.numbers[rows[at]][None], numbers[at, :COLUMNS_SHOWN]])) for at in shown]
    )
    (context.scratch / SHEET).write_bytes(pictures.png(sheet))
    result: dict[str, object] = {"samples": len(rows), "k": found.index.shape[1], "searched": len(bank)}
    if listed:
        result["neighbours"] = [
            {
                "sample": int(queries.numbers[rows[at]]),
                "nearest": [
                    {
                        "sample": int(bank.numbers[index]),
                        "split": SPLITS[int(bank.split[index])],
                        "label": context.info.classes[int(bank.labels[index])] if bank.labels[index] >= 0 else None,
                        "similarity": round(float(similarity), 4),
                    }
                    for index, similarity in zip(found.index[at].tolist(), found.similarity[at].tolist(), strict=True)
                ],
            }
            for at in range(min(LISTED, len(rows)))
        ]
    return Result(
        result=result,
        files={FILE: table.MEDIA_TYPE, SHEET: "image/png"},
        metrics=_agreement(queries.labels[rows], bank.labels[found.index]),
    )


def _agreement(own: Tensor, theirs: Tensor) -> dict[str, float]:
    """Say which part of the neighbours has the sample's own label, where both have one: a hint at how good this is."""
    known = (own[:, None] >= 0) & (theirs >= 0)
    if not bool(known.any()):
        return {}
    return {"neighbours/label_agreement": ((own[:, None] == theirs) & known).sum().item() / known.sum().item()}


RECIPE = Recipe(
    name="neighbours",
    kind="apply",
    version="1",
    summary="Find the most similar samples of some or of all samples.",
    tasks=("image_classification", "unlabelled_images"),
    Params=NeighboursParams,
    requires=Requires(min_samples=0, trained=True, fewer_than_samples=("k",), sample_numbers=("samples",)),
    apply=apply,
)
