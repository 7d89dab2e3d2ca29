"""Variational autoencoder: a code with a known prior, and a lower bound on the likelihood of the images.

Kingma, Welling: Auto-Encoding Variational Bayes, 2013, arXiv 1312.6114; beta after Higgins et al.: beta-VAE, 2017. Any
backbone encodes. With an `mlp` the decoder is that network backwards, as in the paper; else it is convolutional.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from worker.data.policy import Level, augmented
from worker.parts import seed
from worker.parts.decoders import Decoder, mirrored
from worker.recipe import Batch, Info, PretrainParams, Progress, Recipe, Requires

PICTURES = 8
SAMPLES = 64


class VaeParams(PretrainParams):
    """The code, the likelihood of the pixels, and the weight of the prior."""

    latent_dimension: int = Field(default=20, ge=1, le=4096, description="Width of the code z.")
    likelihood: Literal["bernoulli", "gaussian"] = Field(
        default="bernoulli", description="Of a pixel in [0, 1] given the code."
    )
    deviation: float = Field(
        default=0.1, gt=0, le=10, description="Standard deviation of the gaussian likelihood, in pixels of [0, 1]."
    )
    beta: float = Field(default=1.0, ge=0, le=1000, description="Weight of the divergence from the prior; 1 is a VAE.")
    beta_warmup_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Part of the run over which beta grows linearly from 0."
    )
    augmentation: Level = Field(default="none", description="Of the image that is encoded and reconstructed.")


def bernoulli(logits: Tensor, pixels: Tensor) -> Tensor:
    """Give -log p(x|z) in nats per sample (appendix C.1); both [batch, channels, height, width]."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum((1, 2, 3))


def gaussian(logits: Tensor, pixels: Tensor, *, deviation: float) -> Tensor:
    """Give -log p(x|z) in nats per sample (appendix C.2), the means kept in (0, 1) by a sigmoid (section 5)."""
    error = (pixels - logits.sigmoid()) / deviation
    return (0.5 * error.square() + math.log(deviation) + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Give KL(N(mean, variance) || N(0, 1)) in nats per sample (appendix B); both [batch, d]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def weight(params: VaeParams, progress: Progress) -> float:
    """Give beta at this point of the run."""
    if not params.beta_warmup_fraction:
        return params.beta
    return params.beta * min(1.0, progress.fraction / params.beta_warmup_fraction)


class Vae(nn.Module):
    """Backbone, the two heads of q(z|x), and the decoder of p(x|z), under the negative bound."""

    couples_batch = False

    def __init__(self, params: VaeParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params = backbone, params
        self.mean = nn.Linear(info.feature_dimension, params.latent_dimension)
        self.log_variance = nn.Linear(info.feature_dimension, params.latent_dimension)
        shape = {"channels": info.channels, "size": info.image_size}
        if info.architecture["family"] == "mlp":
            self.decoder: nn.Module = mirrored(backbone, params.latent_dimension, **shape)
        else:
            self.decoder = Decoder(params.latent_dimension, **shape)
        # Both likelihoods are of pixels in [0, 1]; batches come normalised.
        self.register_buffer("_shift", torch.tensor(info.mean)[:, None, None], persistent=False)
        self.register_buffer("_scale", torch.tensor(info.std)[:, None, None], persistent=False)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        mean, log_variance = self.encode(batch["image"])
        reconstruction, kl = self._terms(batch["image"], mean, log_variance, torch.randn_like(mean))
        reconstruction, kl = reconstruction.mean(), kl.mean()
        beta = weight(self._params, progress)
        loss = reconstruction + beta * kl
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "elbo": -(reconstruction + kl)}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give the negative bound of each image, whatever beta is: {"loss": [batch]}, in nats.

        One draw of z per image, the same at every call, so that epochs differ by their weights alone.
        """
        mean, log_variance = self.encode(batch["image"])
        draws = seed.generator(0, "vae", device=mean.device)
        noise = torch.randn(mean.shape, generator=draws, device=mean.device)
        reconstruction, kl = self._terms(batch["image"], mean, log_variance, noise)
        return {"loss": reconstruction + kl}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Show images above what comes back from the means of their codes, and what the prior gives."""
        images = batch["image"][:PICTURES]
        mean, _ = self.encode(images)
        return {
            "reconstructions": torch.cat([images, self._painted(mean)]),
            "samples": self._painted(torch.randn(SAMPLES, mean.shape[1], device=mean.device)),
        }

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log variance of q(z|x), each float32 [batch, d]."""
        # Both in one product, which costs hardly more than either.
        weight = torch.cat([self.mean.weight, self.log_variance.weight])
        bias = torch.cat([self.mean.bias, self.log_variance.bias])
        mean, log_variance = F.linear(self.backbone(images), weight, bias).float().chunk(2, 1)
        return mean, log_variance

    def _terms(self, images: Tensor, mean: Tensor, log_variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Give both terms of the negative bound (equation 10 with one draw), each [batch]."""
        # Normalised and back, a black pixel may end just below 0.
        pixels = torch.addcmul(self.get_buffer("_shift"), images, self.get_buffer("_scale")).clamp(0, 1)
        logits = self.decoder(mean + (0.5 * log_variance).exp() * noise).float()
        if self._params.likelihood == "bernoulli":
            reconstruction = bernoulli(logits, pixels)
        else:
            reconstruction = gaussian(logits, pixels, deviation=self._params.deviation)
        return reconstruction, divergence(mean, log_variance)

    def _painted(self, code: Tensor) -> Tensor:
        """Give the expected image of each code, normalised as the loop's images are."""
        return (self.decoder(code).float().sigmoid() - self.get_buffer("_shift")) / self.get_buffer("_scale")


def inputs(params: VaeParams, info: Info) -> Callable[[Batch, Generator], Batch] | None:
    """Augment the image that is to be reconstructed."""
    return augmented(params.augmentation, info)


RECIPE = Recipe(
    name="vae",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: a code with a known prior that explains each image; new ones can be drawn.",
    tasks=("image_classification", "unlabelled_images"),
    Params=VaeParams,
    requires=Requires(min_samples=2, min_batch=2),
    defaults={"training": {"epochs": 50, "weight_decay": 0.0}},
    build=Vae,
    inputs=inputs,
)
