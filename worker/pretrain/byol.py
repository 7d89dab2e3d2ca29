"""BYOL: predict from one view what a slowly moving teacher makes of the other; nothing is pushed apart.

Grill, Strub, Altché, Tallec, Richemond et al.: Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning,
2020, arXiv 2006.07733. Both views pass each network in one forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from app.domain.spec import Training
from worker.data.pair import ViewParams, byol_views
from worker.parts.heads import projector
from worker.parts.teacher import follow, momentum, teacher_of
from worker.recipe import Batch, Info, Progress, Recipe, Requires, Width

MOMENTUM = 0.996  # tau_base of section 3.3
LEAST_SPREAD = 0.1  # directions begin at about 0.8 (var(relu) over its second moment, in the projector)


class ByolParams(ViewParams):
    """The projection, the prediction, the teacher and the views."""

    projection_hidden: Width | None = Field(
        default=None,
        description="Width of the hidden layers of projector and predictor; null is twice the features' width, "
        "but from 512 to 4096.",
    )
    projection_dimension: int = Field(default=256, ge=2, le=16384, description="Width of projection and prediction.")
    predictor_learning_rate_scale: float = Field(
        default=20.0, gt=0, le=1000,
        description="Learning rate of the predictor over that of the rest. Long runs do with 1, as the paper's; short "
        "ones lose most dimensions unless the predictor stays near its optimum.",
    )  # fmt: skip
    momentum: float | None = Field(
        default=None, ge=0, lt=1,
        description="The paper's tau at the start, which grows to 1 along a cosine; null is 0.996, and in runs under "
        "750 steps as much less as lets the teacher remember a third of the run.",
    )  # fmt: skip


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Give the squared distance of the normalised vectors of each row (equation 2): [batch, d] twice -> [batch]."""
    return (F.normalize(prediction.float(), dim=1) - F.normalize(target.float(), dim=1)).square().sum(1)


class Byol(nn.Module):
    """A backbone with BYOL's projector and predictor, and the teacher; all but the backbone is thrown away."""

    couples_batch = True  # through batch norm, without which it does not work
    least_spread = LEAST_SPREAD

    def __init__(self, params: ByolParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._momentum = backbone, params.momentum
        self._predictor_rate = params.predictor_learning_rate_scale
        wide = max(512, min(4096, 2 * info.feature_dimension))  # 4096 of 2048 in the paper
        hidden = params.projection_hidden or wide
        width = params.projection_dimension
        self.projector = projector(info.feature_dimension, hidden, width)
        self.predictor = projector(width, hidden, width)
        self.teacher = teacher_of(backbone, self.projector)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """Name what is called with images."""
        return [self.backbone, self.teacher]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002 (the contract's argument)
        with torch.no_grad():
            z0, z1 = self.teacher(batch["image"]).chunk(2)
        p0, p1 = self.predictor(self.projector(self.backbone(batch["image"]))).chunk(2)
        loss = (regression(p0, z1) + regression(p1, z0)).mean()
        return {"loss": loss, "spread": spread(z0)}

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:  # noqa: ARG002 (the contract's argument)
        """Let the predictor learn faster than what it predicts: the intuitions of section 3.2 want it near-optimal."""
        return [{"names": ["predictor"], "lr_scale": self._predictor_rate}]

    def after_step(self, progress: Progress) -> None:
        """Let the teacher follow (equation 1)."""
        tau = momentum(self._momentum, step=progress.step, steps=progress.steps, paper=MOMENTUM)
        follow(self.teacher, self.backbone, self.projector, momentum=tau)


def spread(z: Tensor) -> Tensor:
    """Say how far the directions of `z` [batch, d] lie apart: near 1 when they fill the sphere, 0 when it collapsed."""
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


RECIPE = Recipe(
    name="byol",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: predict what a slow copy of the network makes of another view.",
    tasks=("image_classification", "unlabelled_images"),
    Params=ByolParams,
    requires=Requires(min_samples=4, min_batch=4),
    # At the 2e-3 to 4e-3 that suit other recipes, digits lost half the effective rank.
    defaults={"training": {"epochs": 100, "weight_decay": 1e-4, "learning_rate": 1e-3}},
    build=Byol,
    inputs=byol_views,
)
