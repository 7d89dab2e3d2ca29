"""DINO: a student that sees small crops says what a teacher, its own average, says of large ones.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin: Emerging Properties in Self-Supervised Vision Transformers,
2021, arXiv 2104.14294. Multi-crop after Caron et al., arXiv 2006.09882.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from app.domain.errors import UserFault
from worker.data.policy import SMALL, View, byol_view, views
from worker.parts import distributed
from worker.parts.other_sizes import features_of, smaller_size, takes
from worker.parts.teacher import follow, momentum, teacher_of
from worker.recipe import Batch, Info, PretrainParams, Progress, Recipe, Requires, Width

MOMENTUM = 0.996  # lambda of section 3.1
# Steps from which the teacher's temperature rises to the paper's 0.07: the authors do so in runs of 300 epochs and keep
# 0.04 in those of 100 (125,000 steps). Softer targets say too little for a short run.
LONG = 200_000
FEWEST = 2048  # outputs; what lightly gives CIFAR-10


class DinoParams(PretrainParams):
    """The head, the temperatures, the teacher and the crops."""

    output_dimension: int | None = Field(
        default=None, ge=2, le=262144,
        description="The paper's K; null is the power of two under a 16th of the samples, from 2048 to its 65536.",
    )  # fmt: skip
    head_hidden: Width | None = Field(
        default=None,
        description="Width of the head's two hidden layers; null is four times the features' width, at most 2048.",
    )
    # As in the paper for narrow networks too: with 64 dimensions digits took several times the steps.
    bottleneck: Width = Field(default=256, description="Width before the last layer.")
    batch_norm: bool | None = Field(
        default=None,
        description="Batch norm in the head; null is yes for convolutional networks, else no as in the paper.",
    )
    student_temperature: float = Field(default=0.1, gt=0, le=10, description="Of the student's softmax.")
    teacher_temperature: float | None = Field(
        default=None, gt=0, le=10,
        description="Of the teacher's, after its warm-up; null is 0.04, and 0.07 in runs of 200,000 steps or more.",
    )  # fmt: skip
    teacher_temperature_start: float = Field(default=0.04, gt=0, le=10, description="Of the teacher's at the start.")
    teacher_temperature_warmup: float = Field(
        default=0.3, ge=0, le=1, description="Part of the run over which it grows linearly; 30 epochs in the paper."
    )
    centre_momentum: float = Field(default=0.9, ge=0, lt=1, description="Of the teacher's mean output (equation 4).")
    momentum: float | None = Field(
        default=None, ge=0, lt=1,
        description="Of the teacher at the start; it grows to 1 along a cosine; null is 0.996, and in runs under 750 "
        "steps as much less as lets the teacher remember a third of the run.",
    )  # fmt: skip
    freeze_last_layer_epochs: int = Field(default=1, ge=0, le=1000, description="Epochs before the last layer trains.")
    weight_decay_growth: float = Field(
        default=10.0, ge=0, le=1000,
        description="Factor on training.weight_decay at the end, reached along a cosine; 0.04 to 0.4 in the paper.",
    )  # fmt: skip
    local_crops: int | None = Field(
        default=None, ge=0, le=64,
        description="Small crops per image; null is 8, and none up to 32 pixels or where they would be no smaller.",
    )  # fmt: skip
    local_crop_size: int | None = Field(
        default=None, ge=8, le=1024,
        description="Pixels a side; null is 3/7 of the image size where the network takes smaller images (perceptrons "
        "and maxvit_t do not) and the image has 24 pixels or more, else the image size.",
    )  # fmt: skip
    crop_scale_split: float | None = Field(
        default=None, gt=0, lt=1,
        description="Part of the area that large crops exceed and small ones do not; null is 0.4, 0.6 if greyscale. "
        "Without small crops large ones of colour images are cut as BYOL's.",
    )  # fmt: skip
    crop_min_scale: float | None = Field(
        default=None, gt=0, le=1,
        description="Least part of the area a small crop keeps; null is 0.05, 0.2 up to 32 pixels, 0.3 if greyscale.",
    )  # fmt: skip
    colour_strength: float | None = Field(default=None, ge=0, le=2, description="Scales the colour jitter; null is 1.")
    flip: float | None = Field(
        default=None, ge=0, le=1, description="Probability of mirroring; null is 0.5, and 0 for greyscale images."
    )


class Head(nn.Module):
    """Three layers, a bottleneck on the unit sphere, and prototypes of unit length (appendix C)."""

    def __init__(self, features: int, hidden: int, bottleneck: int, outputs: int, *, batch_norm: bool = False) -> None:
        super().__init__()

        def normed() -> list[nn.Module]:
            return [nn.BatchNorm1d(hidden)] if batch_norm else []

        self.layers = nn.Sequential(
            nn.Linear(features, hidden), *normed(), nn.GELU(), nn.Linear(hidden, hidden), *normed(), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(outputs, bottleneck))

    def forward(self, features: Tensor) -> Tensor:
        # Directions alone count: so the magnitude of weight normalisation stays at 1.
        return F.linear(F.normalize(self.layers(features).float(), dim=1), F.normalize(self.prototypes, dim=1))


def cross_entropies(student: Tensor, teacher: Tensor) -> Tensor:
    """Give the mean of H(teacher's view, student's view) over all pairs of different views (equation 3).

    Args:
        student: log-probabilities [views, batch, K], the two large crops first.
        teacher: probabilities [2, batch, K] of the large crops.
    """
    # Every student's view meets the sum of what the teacher says of the others: a few products for all pairs.
    pairs = (teacher.flip(0) * student[:2]).sum() + (teacher.sum(0) * student[2:].sum(0)).sum()
    return -pairs / (2 * (len(student) - 1) * student.shape[1])


class Dino(nn.Module):
    """A backbone with DINO's head, the teacher and its centre; all but the backbone is thrown away."""

    def __init__(self, params: DinoParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self._params = backbone, params
        local = local_size(params, info)
        if local != info.image_size and not takes(backbone, channels=info.channels, size=local):
            raise UserFault(
                f"params.local_crop_size: this network takes no images of {local} pixels; leave it null, or give the "
                f"image size, {info.image_size}.", code="local_crop_size",
            )  # fmt: skip
        outputs = params.output_dimension or 2 ** int(math.log2(min(65536, max(FEWEST, info.samples // 16))))
        hidden = params.head_hidden or min(2048, 4 * info.feature_dimension)
        normed = info.architecture["family"] == "convolutional" if params.batch_norm is None else params.batch_norm
        self.couples_batch = normed  # through its statistics alone: the centre is that of earlier steps
        self.projector = Head(info.feature_dimension, hidden, params.bottleneck, outputs, batch_norm=normed)
        self.teacher = teacher_of(backbone, self.projector)
        self.register_buffer("centre", torch.zeros(outputs))
        self._means: list[Tensor] = []  # of the micro-batches of this step

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """Name what is called with images."""
        return [self.backbone, self.teacher]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        large, small = batch["image"], batch.get("image_local")
        with torch.no_grad():
            said = self.teacher(large).float()  # [2 * batch, K]
            centre = self.get_buffer("centre")
            target = ((said - centre) / teacher_temperature(self._params, progress)).softmax(1)
        if self.training:
            self._means.append(said.mean(0))
        if small is not None and small.shape[-1] == large.shape[-1]:
            features = self.backbone(torch.cat([large, small]))
        else:
            features = self.backbone(large)
            if small is not None:
                features = torch.cat([features, features_of(self.backbone, small)])
        logits = self.projector(features).float() / self._params.student_temperature
        rows = len(large) // 2
        loss = cross_entropies(logits.log_softmax(1).unflatten(0, (-1, rows)), target.unflatten(0, (2, rows)))
        # Low when every image gets an answer of its own and all answers are used; both collapses show.
        entropy = -(target * target.clamp(min=1e-12).log()).sum(1).mean()
        mean = target.mean(0)
        return {"loss": loss, "target_entropy": entropy, "used": -(mean * mean.clamp(min=1e-12).log()).sum()}

    def at_step(self, progress: Progress) -> dict[str, float]:
        """Let weight decay grow along a cosine."""
        end = self._params.weight_decay_growth
        return {"weight_decay": end + (1 - end) * (1 + math.cos(math.pi * progress.fraction)) / 2}

    def after_backward(self, progress: Progress) -> None:
        """Leave the last layer alone at first."""
        if progress.epoch < self._params.freeze_last_layer_epochs:
            self.projector.prototypes.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Let the teacher follow and the centre move (equation 4), over all processes."""
        tau = momentum(self._params.momentum, step=progress.step, steps=progress.steps, paper=MOMENTUM)
        follow(self.teacher, self.backbone, self.projector, momentum=tau)
        mean = distributed.mean(torch.stack(self._means).mean(0))
        self.get_buffer("centre").lerp_(mean, 1 - self._params.centre_momentum)
        self._means.clear()


def teacher_temperature(params: DinoParams, progress: Progress) -> float:
    """Give the teacher's temperature at this step: a linear warm-up, then constant."""
    start, part = params.teacher_temperature_start, params.teacher_temperature_warmup
    end = params.teacher_temperature or (0.07 if progress.steps >= LONG else 0.04)
    return end if progress.fraction >= part else start + (end - start) * progress.fraction / part


def local_size(params: DinoParams, info: Info) -> int:
    """Give the side of the small crops."""
    return params.local_crop_size or smaller_size(info.architecture, info.image_size)


def inputs(params: DinoParams, info: Info) -> Callable[[Batch, Generator], Batch]:
    """Draw two large crops, "image" [2 * batch, …], and the small ones, "image_local" [crops * batch, …]."""
    small, colour = info.image_size <= SMALL, info.channels == 3
    split = params.crop_scale_split or (0.4 if colour else 0.6)
    least = min(params.crop_min_scale or (0.3 if not colour else 0.2 if small else 0.05), split)

    def view(number: int) -> View:
        made = byol_view(
            number, image_size=info.image_size, channels=info.channels, strength=params.colour_strength
        )  # fmt: skip
        return replace(made, flip=made.flip if params.flip is None else params.flip)

    side = local_size(params, info)
    # Up to 32 pixels small crops tell little, and those that are no smaller cost as much as large ones: on digits and
    # on 10,000 CIFAR-10 images runs of equal time learnt more from the steps.
    usual = 0 if small or side == info.image_size else 8
    count = usual if params.local_crops is None else params.local_crops
    first, second = view(0), view(1)
    # Alone, large crops may be smaller, as the authors' code advises: BYOL's own. Not so where colour says nothing.
    smallest = split if count else params.crop_min_scale or (first.crop_scale[0] if colour else split)
    first, second = (replace(each, crop_scale=(smallest, 1.0)) for each in (first, second))
    local = replace(first, crop_scale=(least, split), size=side, blur=0.0 if small else 0.5)
    several = views(local, count)

    def draw(batch: Batch, generator: Generator) -> Batch:
        images = batch["image"]
        large = torch.cat([first(images, generator), second(images, generator)])
        return {**batch, "image": large, **({"image_local": several(images, generator)} if count else {})}

    return draw


RECIPE = Recipe(
    name="dino",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: say of small crops what a slow copy of the network says of large ones.",
    tasks=("image_classification", "unlabelled_images"),
    Params=DinoParams,
    requires=Requires(min_samples=4, min_batch=4),
    defaults={"training": {"epochs": 100, "weight_decay": 0.04, "warmup_fraction": 0.1, "gradient_clip": 3.0}},
    build=Dino,
    inputs=inputs,
)
