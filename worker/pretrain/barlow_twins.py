"""Barlow Twins: the cross-correlation of two views' embeddings shall be the identity.

Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021,
arXiv 2103.03230. Both views pass the network in one forward, which the authors do one by one: both are drawn from one
distribution here, so batch norm estimates the same statistics from twice the samples. The embeddings are normalised for
each view by itself, as equation 2 has it.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from worker.data.pair import ViewParams, two_views
from worker.parts import distributed
from worker.parts.heads import projector
from worker.recipe import Batch, Info, Progress, Recipe, Requires, Width

EPSILON = 1e-5  # on the variance, as in the batch norm that normalises the authors' embeddings


class BarlowTwinsParams(ViewParams):
    """The weights of the loss, the projection and the views."""

    redundancy_weight: float = Field(
        default=0.0051, ge=0, le=10, description="The paper's lambda: of the correlations between dimensions."
    )
    # The authors' rate of biases over that of weights, 0.0048 / 0.2: LARS sees the scale only in biases.
    scale_loss: float = Field(
        default=0.024, gt=0, le=1000, description="Scales the whole loss; what Adam does hardly depends on it."
    )
    projection_hidden: Width | None = Field(
        default=None,
        description="Width of the two hidden layers; null is four times the features' width, at most 8192.",
    )
    projection_dimension: int | None = Field(
        default=None, ge=2, le=16384,
        description="Width of the embedding; null is four times the features' width, at most 8192.",
    )  # fmt: skip


def cross_correlation(z0: Tensor, z1: Tensor) -> Tensor:
    """Give the cross-correlation [d, d] of the embeddings of both views over the batch of all processes (equation 2).

    Args:
        z0, z1: [batch, d], of this process alone.
    """
    with torch.autocast(z0.device.type, enabled=False):  # bf16 would round away what is left to decorrelate
        z0, z1 = distributed.all_gather(z0.float()), distributed.all_gather(z1.float())
        return _normalised(z0).T @ _normalised(z1) / len(z0)


def _normalised(z: Tensor) -> Tensor:
    return (z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + EPSILON).sqrt()


class BarlowTwins(nn.Module):
    """A backbone with Barlow Twins' projection, which is thrown away afterwards."""

    couples_batch = True

    def __init__(self, params: BarlowTwinsParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params = backbone, params
        wide = min(8192, 4 * info.feature_dimension)  # 8192 of 2048 in the paper
        hidden = params.projection_hidden or wide
        self.projection = projector(info.feature_dimension, hidden, hidden, params.projection_dimension or wide)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002 (the contract's argument)
        z0, z1 = self.projection(self.backbone(batch["image"])).chunk(2)
        invariance, redundancy = terms(cross_correlation(z0, z1))
        loss = self._params.scale_loss * (invariance + self._params.redundancy_weight * redundancy)
        return {"loss": loss, "invariance": invariance, "redundancy": redundancy}


def terms(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Give the two sums of equation 1 for `correlation` [d, d]: invariance and, unweighted, redundancy reduction."""
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum(), (correlation - torch.diag(diagonal)).square().sum()


RECIPE = Recipe(
    name="barlow_twins",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: dimensions agree between views and differ from each other.",
    tasks=("image_classification", "unlabelled_images"),
    Params=BarlowTwinsParams,
    requires=Requires(min_samples=4, min_batch=4),
    defaults={"training": {"epochs": 100, "weight_decay": 1e-4}},
    build=BarlowTwins,
    inputs=two_views,
)
