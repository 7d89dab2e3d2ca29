"""RandAugment (Cubuk et al., arXiv 1909.13719) of a whole batch: some of 14 operations on every sample, drawn for it.

Operations, ranges and rounding are those of torchvision's v2 RandAugment on bytes. A batch is sorted by operation, so
that every operation runs once and on its own samples only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor

from worker.data.augment import LUMA
from worker.data.policy import Augment, View, on_host
from worker.data.source import carried

BINS = 30  # the largest magnitude
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast",
    "sharpness", "posterise", "solarise", "autocontrast", "equalise",
)  # fmt: skip


@dataclass(frozen=True)
class RandAugment:
    """How many operations, how strong (0 to 30), and how far each sample's own strength lies around that (normal)."""

    operations: int = 2
    magnitude: float = 9.0
    spread: float = 0.0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Draw for every sample of `images` [batch, channels, height, width], bytes or in [0, 1]; gives bytes."""
        # A sample's draws lie in one row, so that several processes can share a batch's (shares.py).
        shape, device = (len(images), self.operations), generator.device
        operations = torch.randint(len(OPERATIONS), shape, generator=on_host(generator))
        noise = torch.randn(shape, generator=generator, device=device)
        levels = (self.magnitude + self.spread * noise).clamp_(0, BINS) / BINS
        signs = torch.randint(2, shape, generator=generator, device=device) * 2 - 1
        images = images if images.dtype == torch.uint8 else images.mul(255).round_().to(torch.uint8)
        return apply(images, operations.T, levels.T, signs.T)


def beside(view: View | None, drawn: RandAugment) -> Augment:
    """Put RandAugment in place of a policy's own turns and colours: after its crop and mirror, before it erases.

    That is its place in the training scripts of torchvision and timm.
    """
    if view is None:
        return drawn
    moves = replace(view, rotate=0, translate=0, zoom=0, shear=0, jitter=0, greyscale=0, solarise=0, erase=0)
    erases = View(view.size, erase=view.erase)

    def augment(images: Tensor, generator: Generator) -> Tensor:
        return erases(drawn(moves(images, generator), generator), generator)

    return augment


def apply(images: Tensor, operations: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Apply given operations one after another.

    Args:
        images: uint8 [batch, channels, height, width], 1 or 3 channels.
        operations: int64 [rounds, batch], numbers in OPERATIONS; on the host, because they say what is to be done.
        levels: float [rounds, batch], 0 (weakest) to 1.
        signs: [rounds, batch], 1 or -1: the way of what can go two ways.
    """
    for operation, level, sign in zip(operations, levels, signs, strict=True):
        lengths = np.bincount(operation.numpy(), minlength=len(OPERATIONS)).tolist()
        order = carried(operation.argsort(), images.device)
        parts = zip(
            images[order].split(lengths), level[order].split(lengths), (level * sign)[order].split(lengths),
            OPERATIONS, strict=True,
        )  # fmt: skip
        made = [_DO[name](part, how, signed) if len(part) else part for part, how, signed, name in parts]
        images = torch.empty_like(images).index_copy_(0, order, torch.cat(made))
    return images


def _identity(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    return images


def _shear_x(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    lean, corner = 0.3 * signed, images.shape[2] / 2  # about the corner of the image, unlike a rotation
    return _warp(images, _rows(1.0, lean, lean * corner, 0.0, 1.0, 0.0))


def _shear_y(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    lean, corner = 0.3 * signed, images.shape[3] / 2
    return _warp(images, _rows(1.0, 0.0, 0.0, lean, 1.0, lean * corner))


def _translate_x(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    move = (150 / 331 * images.shape[3] * signed).trunc()
    return _warp(images, _rows(1.0, 0.0, -move, 0.0, 1.0, 0.0))


def _translate_y(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    move = (150 / 331 * images.shape[2] * signed).trunc()
    return _warp(images, _rows(1.0, 0.0, 0.0, 0.0, 1.0, -move))


def _rotate(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    turn = torch.deg2rad(-30 * signed)
    return _warp(images, _rows(turn.cos(), turn.sin(), 0.0, -turn.sin(), turn.cos(), 0.0))


def _rows(*entries: Tensor | float) -> Tensor:
    """Make 2x3 matrices [n, 2, 3] of entries that are the same for all samples, or [n]."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    whole = [entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in entries]
    return torch.stack(whole, 1).view(-1, 2, 3)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Take every pixel from where `matrix` [n, 2, 3] sends it, the nearest one, black outside; about the centre."""
    count, channels, height, width = images.shape
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    across, down = (
        (row[:, 0, None, None] * x + row[:, 1, None, None] * y[:, None] + row[:, 2, None, None])
        for row in matrix.unbind(1)
    )  # each [n, height, width]
    column, line = (across + (width - 1) / 2).round_().long(), (down + (height - 1) / 2).round_().long()
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    place = (line.clamp_(0, height - 1) * width + column.clamp_(0, width - 1)).view(count, 1, -1)
    taken = images.flatten(2).gather(2, place.expand(-1, channels, -1)).view_as(images)
    return taken * inside[:, None]


def _brightness(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    return _blend(images, torch.zeros((), device=images.device), signed)


def _colour(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    return _blend(images, _grey(images), signed) if images.shape[1] == 3 else images


def _contrast(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), signed)


def _sharpness(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    if min(images.shape[2:]) <= 2:
        return images
    values = images.to(torch.int16)
    lines = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    around = lines[:, :, :, :-2] + lines[:, :, :, 1:-1] + lines[:, :, :, 2:]
    blurred = (around + 4 * values[:, :, 1:-1, 1:-1]).mul(1 / 13).round_()  # a centre of 5 among ones
    made = images.clone()  # the border stays as it is
    made[:, :, 1:-1, 1:-1] = _blend(images[:, :, 1:-1, 1:-1], blurred, signed)
    return made


def _grey(images: Tensor) -> Tensor:
    """Give the luma of bytes in whole numbers: float [n, 1, height, width]."""
    if images.shape[1] != 3:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).floor_()[:, None]


def _blend(images: Tensor, other: Tensor, signed: Tensor) -> Tensor:
    """Go from the images towards `other` by up to 0.9 of the way where `signed` [n] is negative, else away from it."""
    ratio = (1 + 0.9 * signed)[:, None, None, None]
    return (images * ratio + other * (1 - ratio)).clamp_(0, 255).to(torch.uint8)


def _posterise(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    bits = (8 - 4 * level).round_().to(torch.int32)
    mask = (torch.full_like(bits, 255) << (8 - bits)).bitwise_and_(255).to(torch.uint8)
    return images & mask[:, None, None, None]


def _solarise(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(images >= (255 * (1 - level))[:, None, None, None], 255 - images, images)


def _autocontrast(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    least, most = (edge.float() for edge in (images.amin((2, 3), True), images.amax((2, 3), True)))
    flat = most == least
    scale = torch.where(flat, 1.0, (most - least) * (1 / 255))
    return (images - torch.where(flat, 0.0, least)).div_(scale).clamp_(0, 255).to(torch.uint8)


def _equalise(images: Tensor, level: Tensor, signed: Tensor) -> Tensor:  # noqa: ARG001
    """Spread the histogram of every channel evenly, with Pillow's whole-number steps."""
    values = images.flatten(2).long()  # [n, channels, pixels]
    histogram = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    brightest = histogram.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    before = histogram.cumsum(2) - histogram  # pixels darker than each value
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    return torch.where(step > 0, table.gather(2, values), values).to(torch.uint8).view_as(images)


_DO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "identity": _identity, "shear_x": _shear_x, "shear_y": _shear_y, "translate_x": _translate_x,
    "translate_y": _translate_y, "rotate": _rotate, "brightness": _brightness, "colour": _colour,
    "contrast": _contrast, "sharpness": _sharpness, "posterise": _posterise, "solarise": _solarise,
    "autocontrast": _autocontrast, "equalise": _equalise,
}  # fmt: skip
