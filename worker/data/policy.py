"""Augmentation policies: what is drawn, how strongly, for which images. The operations are in augment.py.

Images of at most 32 pixels get smaller moves and no blur (SimCLR's own CIFAR settings); greyscale images get no colour
and are never mirrored, because a mirrored digit or letter is another sign.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from worker.data import augment
from worker.parts.seed import generator as seeded
from worker.recipe import Batch, Info

Augment = Callable[[Tensor, Generator], Tensor]
Level = Literal["none", "light", "standard", "strong"]
SMALL = 32


def uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """Draw one number per sample."""
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def chance(count: int, probability: float, generator: Generator) -> Tensor:
    """Draw one yes or no per sample."""
    return torch.rand(count, generator=generator, device=generator.device) < probability


def on_host(generator: Generator) -> Generator:
    """Give the generator of what decides how the host goes on: to read such a draw from a device is to wait for it.

    On a CPU it is the generator itself. Beside a device's it is another one, made of its seed and of how much it has
    drawn, so what it gives is a function of the same (seed, step).
    """
    if generator.device.type == "cpu":
        return generator
    return seeded(generator.initial_seed(), "host", generator.get_offset())


@dataclass(frozen=True)
class View:
    """Everything that may happen to one view of an image. A zero, or a range without width, switches a thing off.

    crop_scale
        the part of the area that a random resized crop keeps, as (least, most).
    crop_padding
        pixels a plain crop may move the image by, within a reflected border.
    brightness, contrast, saturation, hue
        half-widths as in v2 ColorJitter, applied together with probability `jitter`.
    rotate, translate, zoom, shear
        degrees, part of the side (whole pixels where it comes alone), factor around 1, degrees.
    erase
        probability of erasing a box of 2 to 33 % of the area.
    """

    size: int
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    flip: float = 0.0
    vertical_flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    greyscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    rotate: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    erase: float = 0.0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Draw for every sample of `images` [batch, channels, height, width] and apply.

        Gives uint8 when uint8 images were only moved, else float in [0, 1]. Draws depend on the generator and the batch
        size alone, never on the pixels.
        """
        if self.vertical_flip:
            images = augment.upside_down(images, chance(len(images), self.vertical_flip, generator))
        if self.crop_padding:
            images = self._move(images, generator)
        if self.rotate or self.translate or self.zoom or self.shear:
            images = self._affine(augment.to_float(images), generator)
        if self.crop_scale != (1.0, 1.0) or self.blur or (self.flip and not self.crop_padding):
            images = self._resample(augment.to_float(images), generator)
        if self.jitter or self.greyscale:
            images = self._recolour(augment.to_float(images), generator)
        if self.solarise:
            threshold = torch.where(chance(len(images), self.solarise, generator), 128 / 255, 2.0)
            images = augment.solarise(augment.to_float(images), threshold)
        if self.erase:
            images = self._erase(augment.to_float(images), generator)
        return images

    def _move(self, images: Tensor, generator: Generator) -> Tensor:
        batch, most = len(images), 2 * self.crop_padding + 1
        top = torch.randint(most, (batch,), generator=generator, device=generator.device)
        left = torch.randint(most, (batch,), generator=generator, device=generator.device)
        return augment.crop(images, top, left, chance(batch, self.flip, generator), padding=self.crop_padding)

    def _affine(self, images: Tensor, generator: Generator) -> Tensor:
        batch, side = len(images), images.shape[3]
        angle = uniform(batch, -self.rotate, self.rotate, generator)
        moved = torch.stack([uniform(batch, -1, 1, generator) for _ in "xy"], 1) * (self.translate * side)
        scale = uniform(batch, 1 - self.zoom, 1 + self.zoom, generator)
        shear = uniform(batch, -self.shear, self.shear, generator)
        if self.rotate or self.zoom or self.shear:
            return augment.affine(images, angle, moved, scale, shear)
        return augment.translate(images, *moved.round().long().unbind(1))

    def _resample(self, images: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = images.shape
        top, left, tall, wide = self._boxes(batch, height, width, generator)
        flip = chance(batch, 0.0 if self.crop_padding else self.flip, generator)
        rows = augment.resize_matrix(top, tall, source=height, size=self.size)
        columns = augment.resize_matrix(left, wide, source=width, size=self.size, flip=flip)
        if self.blur:
            # The kernel is a tenth of the side, as in SimCLR, A.1.
            kernel = max(3, self.size // 10 | 1)
            sigma = uniform(batch, *self.blur_sigma, generator) * chance(batch, self.blur, generator)
            blur = augment.blur_matrix(sigma, size=self.size, kernel_size=kernel)
            rows, columns = torch.bmm(blur, rows), torch.bmm(blur, columns)
        return augment.resample(images, rows, columns)

    def _boxes(
        self, batch: int, height: int, width: int, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw crops as v2 RandomResizedCrop does, but cut an oversized side to the image instead of drawing again."""
        area = uniform(batch, *self.crop_scale, generator) * (height * width)
        low, high = (math.log(ratio) for ratio in self.crop_ratio)
        ratio = uniform(batch, low, high, generator).exp()
        if self.crop_scale == (1.0, 1.0):
            ratio = torch.ones_like(ratio)
        wide = (area * ratio).sqrt().round().clamp(1, width)
        tall = (area / ratio).sqrt().round().clamp(1, height)
        top = (uniform(batch, 0, 1, generator) * (height - tall + 1)).floor()
        left = (uniform(batch, 0, 1, generator) * (width - wide + 1)).floor()
        return top, left, tall, wide

    def _recolour(self, images: Tensor, generator: Generator) -> Tensor:
        batch = len(images)
        jittered = chance(batch, self.jitter, generator)

        def factor(half: float) -> Tensor:
            return torch.where(jittered, uniform(batch, max(0.0, 1 - half), 1 + half, generator), 1.0)

        # ColorJitter shuffles its four steps for each image. Of their orders only what contrast sees differs by more
        # than clamping, so each sample draws whether contrast comes first or last.
        colour = augment.Colour(images)
        first = chance(batch, 0.5, generator)
        contrast, one = factor(self.contrast), torch.ones(batch, device=images.device)
        colour.contrast(torch.where(first, contrast, one))
        colour.brightness(factor(self.brightness)).saturation(factor(self.saturation))
        if self.hue:
            colour.hue(uniform(batch, -self.hue, self.hue, generator) * jittered)
        colour.contrast(torch.where(first, one, contrast))
        if self.greyscale:
            colour.saturation(torch.where(chance(batch, self.greyscale, generator), 0.0, one))
        return colour.apply().clamp_(0, 1)

    def _erase(self, images: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = images.shape
        boxes = replace(self, crop_scale=(0.02, 0.33), crop_ratio=(0.3, 3.3))._boxes(batch, height, width, generator)
        top, left, tall, wide = boxes
        return augment.erase(images, top, left, tall * chance(batch, self.erase, generator), wide)


def policy(level: Level, *, image_size: int, channels: int) -> View | None:
    """Give the supervised policy of a level; `none` gives None, so that features can be cached."""
    small, colour = image_size <= SMALL, channels == 3
    moved = View(image_size, crop_padding=max(1, image_size // 8), flip=0.5 if colour else 0.0)
    match level:
        case "none":
            return None
        case "light":
            return moved if colour else replace(moved, crop_padding=max(1, image_size // 16))
        case "standard" if not colour:
            return View(image_size, rotate=10, translate=0.08, zoom=0.1, shear=5)
        case "standard":
            base = moved if small else View(image_size, crop_scale=(0.35, 1.0), flip=0.5)
            return replace(base, jitter=0.8, brightness=0.2, contrast=0.2, saturation=0.2)
        case "strong" if not colour:
            return View(
                image_size, rotate=15, translate=0.12, zoom=0.15, shear=10, jitter=0.8, brightness=0.3, contrast=0.3,
                erase=0.25,
            )  # fmt: skip
        case "strong":
            return View(
                image_size, crop_scale=(0.4, 1.0) if small else (0.2, 1.0), flip=0.5, jitter=0.8, brightness=0.4,
                contrast=0.4, saturation=0.4, hue=0.1, greyscale=0.1, erase=0.25,
            )  # fmt: skip


def augmented(level: Level, info: Info) -> Callable[[Batch, Generator], Batch] | None:
    """Make the inputs of a recipe that sees one view of every image; None where `level` is none."""
    view = policy(level, image_size=info.image_size, channels=info.channels)
    if view is None:
        return None

    def draw(batch: Batch, generator: Generator) -> Batch:
        return {**batch, "image": view(batch["image"], generator)}

    return draw


def simclr_view(*, image_size: int, channels: int, strength: float | None = None) -> View:
    """Give SimCLR's view (Chen et al., arXiv 2002.05709, appendix A): resized crop, mirror, colour, greyscale, blur.

    `strength` scales the colour jitter; null is 1.0, and 0.5 up to 32 pixels (appendix B.9), where blur is left out.
    """
    small, colour = image_size <= SMALL, channels == 3
    strong = strength if strength is not None else (0.5 if small else 1.0)
    if not colour:
        return View(
            image_size, crop_scale=(0.5, 1.0) if small else (0.2, 1.0), rotate=15 if small else 0,
            translate=0.08 if small else 0.0, zoom=0.1 if small else 0.0, shear=10 if small else 0, jitter=0.8,
            brightness=min(0.8 * strong, 0.9), contrast=min(0.8 * strong, 0.9), blur=0.0 if small else 0.5,
        )  # fmt: skip
    return View(
        image_size, crop_scale=(0.2 if small else 0.08, 1.0), flip=0.5, jitter=0.8, brightness=0.8 * strong,
        contrast=0.8 * strong, saturation=0.8 * strong, hue=0.2 * strong, greyscale=0.2, blur=0.0 if small else 0.5,
    )  # fmt: skip


def byol_view(number: int, *, image_size: int, channels: int, strength: float | None = None) -> View:
    """Give the first (0) or second (1) view of BYOL (Grill et al., arXiv 2006.07733, appendix B), which DINO took over.

    Colour is jittered half as much as in SimCLR at its strength 1; `strength` scales that, null is 1. The first view is
    always blurred, the second in one of ten and solarised in one of five. Greyscale images get SimCLR's views.
    """
    view = simclr_view(image_size=image_size, channels=channels, strength=strength)
    if channels != 3:
        return view
    strong = 1.0 if strength is None else strength
    blur = 0.0 if image_size <= SMALL else (1.0, 0.1)[number]
    return replace(
        view, brightness=0.4 * strong, contrast=0.4 * strong, saturation=0.2 * strong, hue=0.1 * strong, blur=blur,
        solarise=(0.0, 0.2)[number],
    )  # fmt: skip


def views(view: Augment, count: int) -> Augment:
    """Draw `count` views of every image and lay them behind one another: [count * batch, channels, size, size]."""

    def several(images: Tensor, generator: Generator) -> Tensor:
        # One call on repeated rows, so that every view of every sample has its own draw.
        return view(images.repeat(count, 1, 1, 1), generator)

    return several


def mix(
    batch: dict[str, Tensor], generator: Generator, *, mixup: float, cutmix: float, classes: int
) -> dict[str, Tensor]:
    """Apply MixUp or CutMix with Beta parameters `mixup` and `cutmix` (0 is off); where both are on, a coin decides.

    Returns:
        the batch with "image" changed and "target" [batch, classes] added; unchanged when both are off.
    """
    if not mixup and not cutmix:
        return batch
    images = batch["image"]
    count, _, height, width = images.shape
    device = generator.device
    partner = torch.randperm(count, generator=generator, device=device)
    # `numpy` reads nothing but the host's own memory, here and where RandAugment counts.
    use_mixup = bool(mixup) and (not cutmix or bool(chance(1, 0.5, on_host(generator)).numpy()[0]))
    share = _beta(count, mixup if use_mixup else cutmix, generator)
    if use_mixup:
        return augment.mixup(batch, share, partner, classes=classes)
    tall, wide = ((1 - share).sqrt() * side for side in (height, width))
    row = (uniform(count, 0, 1, generator) * height).floor()
    column = (uniform(count, 0, 1, generator) * width).floor()
    top, left = (row - tall / 2).floor(), (column - wide / 2).floor()
    return augment.cutmix(batch, top, left, tall.round(), wide.round(), partner, classes=classes)


def _beta(count: int, alpha: float, generator: Generator) -> Tensor:
    """Draw from Beta(alpha, alpha) as a ratio of Gammas; torch's own takes no generator outside `_sample_dirichlet`."""
    concentration = torch.full((count, 2), alpha, device=generator.device)
    return torch._sample_dirichlet(concentration, generator)[:, 0]
