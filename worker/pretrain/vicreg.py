"""VICReg: two views shall agree, every dimension shall vary, and no two dimensions shall say the same.

Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, 2022,
arXiv 2105.04906. Both views pass the network in one forward, which the authors do one by one: both are drawn from one
distribution here, so batch norm estimates the same statistics from twice the samples. The loss keeps the views apart.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from worker.data.pair import ViewParams, two_views
from worker.parts import distributed
from worker.parts.heads import projector
from worker.recipe import Batch, Info, Progress, Recipe, Requires, Width

LEAST_SPREAD = 0.1  # the expander begins at 0.34 (var(relu) / 3 of its last layer) and is drawn towards 1


class VicregParams(ViewParams):
    """The weights of the three terms, the expander and the views."""

    invariance_weight: float = Field(default=25.0, ge=0, le=1000, description="Of the distance of the two views.")
    variance_weight: float = Field(
        default=25.0, ge=0, le=1000, description="Of the hinge that keeps every dimension's spread at 1; 0 collapses."
    )
    covariance_weight: float = Field(default=1.0, ge=0, le=1000, description="Of the covariances between dimensions.")
    expander_hidden: Width | None = Field(
        default=None,
        description="Width of the expander's two hidden layers; null is four times the features' width, at most 8192.",
    )
    expander_dimension: int | None = Field(
        default=None, ge=2, le=16384,
        description="Width of the embedding; null is four times the features' width, at most 8192.",
    )  # fmt: skip


def variance(z: Tensor) -> Tensor:
    """Give the hinge on the spread of every dimension of `z` [batch, d], as the mean over d (equation 1)."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def covariance(z: Tensor) -> Tensor:
    """Give the squares of the covariances between dimensions of `z` [batch, d], over d (equations 3 and 4)."""
    centred = z - z.mean(dim=0)
    matrix = centred.T @ centred / (len(z) - 1)  # [d, d]
    return (matrix - torch.diag(matrix.diagonal())).square().sum() / z.shape[1]


def terms(z0: Tensor, z1: Tensor) -> dict[str, Tensor]:
    """Give the unweighted terms of the embeddings of both views, over all processes.

    The variance term is the mean of both views, the covariance term their sum: so it is in the authors' code
    (github.com/facebookresearch/vicreg, main_vicreg.py) that the weights 25, 25 and 1 belong to. Equation 6 sums both.

    Args:
        z0, z1: [batch, d], of this process alone.
    """
    with torch.autocast(z0.device.type, enabled=False):  # covariances are differences: bf16 is too coarse for them
        z0, z1 = distributed.all_gather(z0.float()), distributed.all_gather(z1.float())
        return {
            "invariance": F.mse_loss(z0, z1),
            "variance": variance(z0) / 2 + variance(z1) / 2,
            "covariance": covariance(z0) + covariance(z1),
            "spread": torch.cat([z0, z1]).detach().std(dim=0).mean(),
        }


class Vicreg(nn.Module):
    """A backbone with VICReg's expander, which is thrown away afterwards."""

    couples_batch = True
    least_spread = LEAST_SPREAD

    def __init__(self, params: VicregParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params = backbone, params
        wide = min(8192, 4 * info.feature_dimension)  # 8192 of 2048 in the paper
        hidden = params.expander_hidden or wide
        self.expander = projector(info.feature_dimension, hidden, hidden, params.expander_dimension or wide)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002 (the contract's argument)
        z0, z1 = self.expander(self.backbone(batch["image"])).chunk(2)
        found, weights = terms(z0, z1), self._params
        loss = (
            weights.invariance_weight * found["invariance"]
            + weights.variance_weight * found["variance"]
            + weights.covariance_weight * found["covariance"]
        )
        return {"loss": loss, **found}


RECIPE = Recipe(
    name="vicreg",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: views agree, dimensions vary and do not covary.",
    tasks=("image_classification", "unlabelled_images"),
    Params=VicregParams,
    requires=Requires(min_samples=4, min_batch=4),
    defaults={"training": {"epochs": 100, "weight_decay": 1e-4}},
    build=Vicreg,
    inputs=two_views,
)
