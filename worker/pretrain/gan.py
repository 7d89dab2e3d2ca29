"""Generative adversarial network: tell images from generated ones; what learns to tell them is exported.

Goodfellow et al.: Generative Adversarial Networks, 2014, arXiv 1406.2661, with the generator's non-saturating loss
(section 3). R1: Mescheder, Geiger, Nowozin: Which Training Methods for GANs do actually Converge?, 2018,
arXiv 1801.04406, equation 9; every few steps as in StyleGAN2 (arXiv 1912.04958, appendix B). Augmentation of what the
discriminator sees, real or not: Zhao et al.: Differentiable Augmentation, 2020, arXiv 2006.10738. Rates of their own
for the two networks: Heusel et al., arXiv 1706.08500.

Both networks step together, from one sum and one backward pass: the discriminator's term sees generated images as data,
and the generator's term passes through a discriminator whose weights are constants.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from worker.data.policy import View
from worker.parts import metrics, seed
from worker.parts.decoders import Decoder
from worker.recipe import Batch, Info, PretrainParams, Progress, Recipe, Requires

SAMPLES = 64  # in the picture
FAKES = 256  # generated at once for the Frechet distance


class GanParams(PretrainParams):
    """The generator, the penalty, and what the discriminator sees."""

    latent_dimension: int = Field(default=100, ge=1, le=4096, description="Width of the noise z; DCGAN's.")
    # 10 in the paper, for large faces and scenes. On digits that held D down until it told nothing apart: 82 % by k-NN
    # where 0.01, what Karras et al. (arXiv 2006.06676) found for CIFAR-10, gave 90 (one seed, twelve epochs).
    r1_weight: float = Field(
        default=0.01, ge=0, le=10_000, description="The paper's gamma, of half the squared gradient at real images."
    )
    r1_every: int = Field(default=16, ge=1, le=1000, description="Steps between two penalties, which weigh the more.")
    augmentation: tuple[Literal["colour", "translation", "cutout"], ...] = Field(
        default=("colour", "translation", "cutout"), max_length=3,
        description="Of real and generated images alike; greyscale ones get no colour.",
    )  # fmt: skip
    generator_learning_rate_scale: float = Field(
        default=1.0, gt=0, le=100, description="The generator's learning rate over the discriminator's."
    )
    generator_decay: float = Field(
        default=0.999, ge=0, lt=1, description="Of the average of the generator's weights, which paints the pictures."
    )


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Give -log D(x) - log(1 - D(G(z))), means over the batch (equation 1); logits [batch] of D."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Give -log D(G(z)), the mean over the batch (section 3); logits [batch] of D."""
    return F.softplus(-fake).mean()


def r1_penalty(discriminate: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Give the mean squared length of the gradient of D's logit at each real image; differentiable.

    In float32, and with an attention that can be differentiated twice. Batch norm, where D has it, lets a little of one
    image's gradient come from the others of its batch.
    """
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        images = images.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminate(images).sum(), images, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()


class Generator(nn.Module):
    """From noise [batch, d] to images as the loop normalises them; the pixels themselves lie in (0, 1)."""

    def __init__(self, latent: int, info: Info) -> None:
        super().__init__()
        self.decoder = Decoder(latent, channels=info.channels, size=info.image_size)
        self.register_buffer("mean", torch.tensor(info.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(info.std)[:, None, None], persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        return (self.decoder(noise).float().sigmoid() - self.get_buffer("mean")) / self.get_buffer("std")


class Gan(nn.Module):
    """Backbone and head are the discriminator; beside them the generator and the average of its weights."""

    couples_batch = False
    opponents = {"discriminator": ("backbone", "classifier"), "generator": ("generator",)}  # noqa: RUF012

    def __init__(self, params: GanParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params = backbone, params
        self.classifier = nn.Linear(info.feature_dimension, 1)
        self.generator = Generator(params.latent_dimension, info)
        self.average = copy.deepcopy(self.generator).requires_grad_(requires_grad=False)
        self.register_buffer("penalty", torch.zeros(()))  # the latest
        self._view = diff_augment(params, info)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch["image"]
        fake = self.generator(torch.randn(len(images), self._params.latent_dimension, device=images.device))
        shown = self._augmented(images)
        real_logits = self._logits(shown)
        fake_logits = self._logits(self._augmented(fake.detach()), apart=True)
        verdicts = self._logits(self._augmented(fake), apart=True, constant=True)
        discriminator, generator = discriminator_loss(real_logits, fake_logits), generator_loss(verdicts)
        loss = discriminator + generator
        if self._params.r1_weight and progress.step % self._params.r1_every == 0:
            penalty = r1_penalty(lambda given: self._logits(given, apart=True), shown)
            loss = loss + self._params.r1_weight / 2 * self._params.r1_every * penalty
            self.get_buffer("penalty").copy_(penalty.detach())
        return {
            "loss": loss, "discriminator": discriminator, "generator": generator,
            "penalty": self.get_buffer("penalty").clone(), "real_accuracy": (real_logits > 0).float().mean(),
            "fake_accuracy": (fake_logits < 0).float().mean(),
        }  # fmt: skip

    def parameter_groups(self, training: Any) -> list[dict[str, Any]]:  # noqa: ARG002 (the contract's argument)
        """Give the generator its own learning rate."""
        return [{"names": ["generator"], "lr_scale": self._params.generator_learning_rate_scale}]

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Move the average towards the generator; in the first steps faster, so that its start is soon forgotten."""
        decay = min(self._params.generator_decay, (1 + progress.step) / (10 + progress.step))
        ours, theirs = self.average.state_dict(), self.generator.state_dict()
        real = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in real], [theirs[name] for name in real], 1 - decay)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give how badly each image is known to be real, -log D(x): [batch]. It grows where D learns by heart."""
        return {"loss": F.softplus(-self._logits(batch["image"]))}

    def probed(self, features: Tensor) -> dict[str, float]:
        """Give the Frechet distance between features of real images and of as many generated ones.

        In the backbone's own features, which move as it learns and which it learns so as to tell both apart: the value
        compares moments of one run at most. It is too large for few images, by about the variance over their number.
        """
        noise = self._noise(len(features), features.device)
        made = [self.backbone(self.average(part)).float().flatten(1) for part in noise.split(FAKES)]
        return {"frechet_distance": metrics.frechet_distance(features, torch.cat(made))}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Show what the average of the generator makes of the same noise in every run."""
        return {"samples": self.average(self._noise(SAMPLES, batch["image"].device))}

    def _noise(self, count: int, device: torch.device) -> Tensor:
        draws = seed.generator(0, "gan", device=device)
        return torch.randn(count, self._params.latent_dimension, generator=draws, device=device)

    def _augmented(self, images: Tensor) -> Tensor:
        if self._view is None:
            return images
        mean, std = self.generator.get_buffer("mean"), self.generator.get_buffer("std")
        device = images.device
        draws = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        return (self._view(images * std + mean, draws) - mean) / std

    def _logits(self, images: Tensor, *, apart: bool = False, constant: bool = False) -> Tensor:
        """Give D's logits, float32 [batch].

        Args:
            apart: leave no trace in running statistics, which are those of real images.
            constant: give no gradient to D's weights.
        """
        if not apart:
            return self.classifier(self.backbone(images)).float().squeeze(1)
        features = functional_call(self.backbone, _state(self.backbone, constant=constant), (images,))
        return functional_call(self.classifier, _state(self.classifier, constant=constant), (features,)).float()[:, 0]


def _state(module: nn.Module, *, constant: bool) -> dict[str, Tensor]:
    weights = {name: value.detach() if constant else value for name, value in module.named_parameters()}
    return {**weights, **{name: value.clone() for name, value in module.named_buffers()}}


def diff_augment(params: GanParams, info: Info) -> View | None:
    """Give what happens to every image that the discriminator sees; strengths as in the paper's code."""
    chosen = set(params.augmentation) - (set() if info.channels == 3 else {"colour"})
    if not chosen:
        return None
    colour = "colour" in chosen
    return View(
        info.image_size, translate=0.125 if "translation" in chosen else 0.0,
        erase=1.0 if "cutout" in chosen else 0.0, jitter=1.0 if colour else 0.0, brightness=0.5 if colour else 0.0,
        contrast=0.5 if colour else 0.0, saturation=1.0 if colour else 0.0,
    )  # fmt: skip


RECIPE = Recipe(
    name="gan",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: tell images from generated ones, which another network makes ever better.",
    tasks=("image_classification", "unlabelled_images"),
    Params=GanParams,
    requires=Requires(min_samples=2, min_batch=2, alone="its networks play against each other at every step"),
    defaults={
        "training": {
            "epochs": 100,
            "weight_decay": 0.0,
            "learning_rate": 1e-3,
            "optimizer": {"name": "adam", "betas": [0.5, 0.99]},
        }
    },
    build=Gan,
)
