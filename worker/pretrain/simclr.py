"""SimCLR: two views of an image shall be each other's nearest among all views of the batch.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations, 2020,
arXiv 2002.05709. Both views pass the network in one forward.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from worker.data.pair import ViewParams, two_views
from worker.parts import distributed
from worker.parts.heads import projector
from worker.recipe import Batch, Info, Progress, Recipe, Requires, Width


class SimclrParams(ViewParams):
    """The loss, the projection and the views."""

    temperature: float = Field(default=0.5, gt=0, le=10, description="Of the similarities; the paper's for CIFAR-10.")
    projection_hidden: Width | None = Field(
        default=None, description="Width of the projection's hidden layer; null is the features' width."
    )
    projection_dimension: int = Field(default=128, ge=2, le=16384, description="Width of the projection.")


def nt_xent(z0: Tensor, z1: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Give the normalised temperature-scaled cross entropy (equation 1), and how often the right view was nearest.

    Args:
        z0, z1: the projections of the two views, [batch, d]; of this process alone.
    """
    with torch.autocast(z0.device.type, enabled=False):  # the nearest differ by less than bf16 tells apart
        own = F.normalize(torch.cat([z0, z1]).float(), dim=1)  # [2 * batch, d]
        batch, rank, world = len(z0), distributed.rank(), distributed.world_size()
        # Gathered per process as [world, 2, batch, d]: this process's rows start at rank * 2 * batch.
        everyone = distributed.all_gather(own)  # [world * 2 * batch, d]
        logits = own @ everyone.T / temperature  # [2 * batch, world * 2 * batch]
        start = rank * 2 * batch
        logits.diagonal(start).fill_(float("-inf"))  # an image is not its own neighbour
        partner = start + (torch.arange(2 * batch, device=own.device) + batch) % (2 * batch)
        assert logits.shape[1] == world * 2 * batch
        return F.cross_entropy(logits, partner), (logits.argmax(1) == partner).float().mean()


class Simclr(nn.Module):
    """A backbone with SimCLR's projection, which is thrown away afterwards."""

    couples_batch = True

    def __init__(self, params: SimclrParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._temperature = backbone, params.temperature
        hidden = params.projection_hidden or info.feature_dimension
        # The batch norm at the end is the authors' code's, not the paper's.
        self.projection = projector(info.feature_dimension, hidden, params.projection_dimension, norm_last=True)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002 (the contract's argument)
        z0, z1 = self.projection(self.backbone(batch["image"])).chunk(2)
        loss, matched = nt_xent(z0, z1, temperature=self._temperature)
        return {"loss": loss, "matched": matched}


RECIPE = Recipe(
    name="simclr",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: two random views of an image shall be alike, and unlike other images.",
    tasks=("image_classification", "unlabelled_images"),
    Params=SimclrParams,
    requires=Requires(min_samples=4, min_batch=4),
    defaults={"training": {"epochs": 100, "weight_decay": 1e-4}},
    build=Simclr,
    inputs=two_views,
)
