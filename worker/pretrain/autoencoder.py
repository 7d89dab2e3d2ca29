"""Autoencoder, plain and denoising: reconstruct an image from a short code of it, or of a damaged copy of it.

Vincent, Larochelle, Bengio, Manzagol: Extracting and Composing Robust Features with Denoising Autoencoders, 2008. Any
backbone encodes; its features pass a bottleneck, and a small decoder paints the image from that.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from worker.data.policy import Level, augmented
from worker.parts.decoders import Decoder
from worker.recipe import Batch, Info, PretrainParams, Progress, Recipe, Requires, Width

PICTURES = 8


class AutoencoderParams(PretrainParams):
    """The code and the damage."""

    bottleneck: Width | None = Field(
        default=64, description="Width of the code; null reconstructs from the features themselves."
    )
    noise: float = Field(
        default=0.25, ge=0, le=5,
        description="Damage to the input: the part of the pixels that is masked, or the deviation of Gaussian noise. "
        "0 is a plain autoencoder.",
    )  # fmt: skip
    corruption: Literal["mask", "gaussian"] = Field(default="mask", description="How the input is damaged.")
    augmentation: Level = Field(default="light", description="Of the image that is both damaged and reconstructed.")


class Autoencoder(nn.Module):
    """Backbone, bottleneck and decoder under the mean squared error of normalised pixels."""

    couples_batch = False

    def __init__(self, params: AutoencoderParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params = backbone, params
        code = params.bottleneck or info.feature_dimension
        self.bottleneck = nn.Linear(info.feature_dimension, code) if params.bottleneck else nn.Identity()
        decoder = FlatDecoder if info.architecture["family"] == "mlp" else Decoder
        self.decoder = decoder(code, channels=info.channels, size=info.image_size)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002 (the contract's argument)
        clean = batch["image"]
        return {"loss": F.mse_loss(self._reconstruct(self._damage(clean)).float(), clean)}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give the error of each image from its undamaged self: {"loss": [batch]}."""
        clean = batch["image"]
        return {"loss": (self._reconstruct(clean).float() - clean).square().mean((1, 2, 3))}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Show images, what the encoder saw of them, and what came out: three rows."""
        clean = batch["image"][:PICTURES]
        seen = self._damage(clean)
        return {"reconstructions": torch.cat([clean, seen, self._reconstruct(seen).float()])}

    def _reconstruct(self, images: Tensor) -> Tensor:
        return self.decoder(self.bottleneck(self.backbone(images)))

    def _damage(self, images: Tensor) -> Tensor:
        noise = self._params.noise
        if not noise:
            return images
        if self._params.corruption == "gaussian":
            return images + noise * torch.randn_like(images)
        # The same pixels in every channel: one channel would give the others away. Zero is the mean of the data.
        kept = torch.rand_like(images[:, :1]) >= noise
        return images * kept


class FlatDecoder(nn.Module):
    """From a code [batch, d] to an image through one hidden layer: as plain as the perceptron that encodes."""

    def __init__(self, code: int, *, channels: int, size: int) -> None:
        super().__init__()
        self._shape = (channels, size, size)
        self.layers = nn.Sequential(nn.Linear(code, 512), nn.GELU(), nn.Linear(512, channels * size * size))

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code).unflatten(1, self._shape)


def inputs(params: AutoencoderParams, info: Info) -> Callable[[Batch, Generator], Batch] | None:
    """Augment the image that is to be reconstructed; the damage comes in the forward pass."""
    return augmented(params.augmentation, info)


RECIPE = Recipe(
    name="autoencoder",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: reconstruct each image, or a damaged copy of it, through a short code.",
    tasks=("image_classification", "unlabelled_images"),
    Params=AutoencoderParams,
    requires=Requires(min_samples=2, min_batch=2),
    defaults={"training": {"epochs": 50, "weight_decay": 1e-4}},
    build=Autoencoder,
    inputs=inputs,
)
