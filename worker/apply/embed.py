"""Embeddings of a dataset's samples as a Parquet table, for whatever another program searches, clusters or draws."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from app.domain.errors import UserFault
from worker.data import table
from worker.parts import metrics
from worker.parts.projection import principal_components
from worker.recipe import Context, Params, Recipe, Requires, Result, Splits

FILE = "embedding.parquet"
MEASURED_ROWS = 2000


class EmbedParams(Params):
    """Which samples, and in what form."""

    splits: Splits = Field(default=None, description="Which splits; null is all.")
    components: int | None = Field(
        default=None, ge=1, le=4096,
        description="Project to this many principal components of the chosen samples; null keeps the features.",
    )  # fmt: skip
    normalise: bool = Field(default=False, description="Scale each embedding to length one, after any projection.")


def apply(context: Context) -> Result:
    """Write `embedding.parquet`: sample, split, label, embedding (fixed-size list of float32)."""
    params: EmbedParams = context.params
    dimension = context.info.feature_dimension
    if params.components is not None and params.components > dimension:
        raise UserFault(
            f"params.components: the model's features have {dimension} dimensions; {params.components} components "
            "cannot be taken of them.", code="too_many_components",
        )  # fmt: skip
    samples = context.samples(params.splits)
    values = context.features(samples)
    rows = len(samples)
    found = None
    if params.components is not None:
        found = principal_components(
            values, params.components, context.device, lambda done: context.tick("project", done, rows)
        )

    def shown(part: Tensor) -> Tensor:
        part = found.apply(part) if found is not None else part
        return (F.normalize(part, dim=1) if params.normalise else part).cpu()

    def columns(piece: slice) -> dict[str, object]:
        about = table.described(samples, torch.arange(rows)[piece], context.info.classes)
        return {**about, "embedding": table.vectors(shown(values[piece]))}

    table.write(context.scratch / FILE, rows, columns, lambda done: context.tick("write", done, rows))
    some = values[:: max(1, rows // MEASURED_ROWS)][:MEASURED_ROWS].to(context.device)
    return Result(
        result={
            "samples": rows,
            "dimension": params.components or dimension,
            "explained_variance": float(found.explained.sum()) if found is not None else None,
        },
        files={FILE: table.MEDIA_TYPE},
        metrics={
            "embedding/effective_rank": metrics.effective_rank(some),
            "embedding/feature_spread": metrics.feature_spread(some),
        },
    )


RECIPE = Recipe(
    name="embed",
    kind="apply",
    version="1",
    summary="Write a model's embeddings of a dataset as a Parquet table.",
    tasks=("image_classification", "unlabelled_images"),
    Params=EmbedParams,
    requires=Requires(min_samples=0, trained=True, fewer_than_samples=("components",)),
    apply=apply,
)
