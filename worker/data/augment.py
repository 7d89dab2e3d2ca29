"""Augmentation of a whole batch at once, each sample with its own draw. Here the operations; policy.py draws for them.

Every operation takes its parameters as tensors with one entry per sample, so a test can hold it against torchvision's
v2 function sample by sample. What is linear in space (crop, resize, flip, blur) is one pair of matrices per sample,
what is linear in colour (brightness, contrast, saturation, greyscale) one 3x3 matrix and an offset. Values are not
clamped between the steps of a chain, only at its end.
"""

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-R 601, as torchvision's rgb_to_grayscale has it.
LUMA = (0.2989, 0.587, 0.114)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Give numbers as float32 on a device, made there once: to make them is to wait for the device."""
    with torch.inference_mode(mode=False):  # whoever needs them first
        return torch.tensor(values, device=device)


def to_float(images: Tensor) -> Tensor:
    """Give images as float32 in [0, 1]; uint8 counts from 0 to 255."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Move images within a reflected border, and mirror some; keeps the size and the dtype.

    Args:
        images: [batch, channels, height, width].
        top, left: int64 [batch], 0 to 2 * padding; `padding` is no move.
        flip: bool [batch].
        padding: width of the reflected border, less than the height and the width.
    """
    batch, _, height, width = images.shape
    rows = _reflect(torch.arange(height, device=images.device) + (top - padding)[:, None], height)  # [batch, height]
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = _reflect(columns + (left - padding)[:, None], width)  # [batch, width]
    return _taken(images, rows, columns)


def _taken(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Put images together from their own rows, int64 [batch, height], and columns, int64 [batch, width]."""
    images = images.gather(2, rows[:, None, :, None].expand(images.shape))
    return images.gather(3, columns[:, None, None, :].expand(images.shape))


def translate(images: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Move images by whole pixels, zeros outside; keeps the size and the dtype.

    Args:
        images: [batch, channels, height, width].
        right, down: int64 [batch].
    """
    return cast(Tensor, _Translation.apply(images, right, down))


class _Translation(torch.autograd.Function):
    """Its gradient is moved back, which CUDA does in one order; that of `grid_sample` it sums in another every time."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, right: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(right, down)
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device) - down[:, None]
        columns = torch.arange(width, device=images.device) - right[:, None]
        moved = _taken(images, rows.clamp_(0, height - 1), columns.clamp_(0, width - 1))
        tall, wide = torch.full_like(down, height), torch.full_like(right, width)
        return moved.masked_fill_(~inside_box(images, down, right, tall, wide), 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        right, down = ctx.saved_tensors
        return translate(gradients[0], -right, -down), None, None


def upside_down(images: Tensor, flip: Tensor) -> Tensor:
    """Turn the images with `flip` (bool [batch]) upside down; keeps the dtype."""
    return torch.where(flip[:, None, None, None], images.flip(2), images)


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def resize_matrix(start: Tensor, length: Tensor, *, source: int, size: int, flip: Tensor | None = None) -> Tensor:
    """Make the matrices that cut `length` samples at `start` out of `source` and resize them to `size`.

    The filter is the antialiased triangle of `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`.

    Args:
        start, length: float [batch], in samples; whole numbers give exactly a crop and a resize.
        flip: bool [batch]; mirrored where true.

    Returns:
        float32 [batch, size, source]; every row sums to 1.
    """
    device = start.device
    scale = (length / size)[:, None, None]  # [batch, 1, 1]
    support = scale.clamp(min=1)
    target = torch.arange(size, device=device, dtype=torch.float32)
    target = target.expand(len(start), size)
    if flip is not None:
        target = torch.where(flip[:, None], size - 1 - target, target)
    centre = start[:, None, None] + (target[:, :, None] + 0.5) * scale  # [batch, size, 1]
    position = torch.arange(source, device=device, dtype=torch.float32) + 0.5  # [source]
    weight = (1 - (position - centre).abs() / support).clamp_(min=0)
    inside = (position > start[:, None, None]) & (position < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(2, keepdim=True).clamp_(min=1e-12)


def blur_matrix(sigma: Tensor, *, size: int, kernel_size: int) -> Tensor:
    """Make the matrices that blur `size` samples with a Gaussian and reflected borders, as v2 gaussian_blur does.

    Args:
        sigma: float [batch], in samples; 0 is the identity.
        kernel_size: odd, at most 2 * size - 1.

    Returns:
        float32 [batch, size, size].
    """
    half = kernel_size // 2
    offset = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # [batch, kernel]
    tap = _reflect(torch.arange(size, device=sigma.device)[:, None] + offset, size)  # [size, kernel]
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix.scatter_add_(2, tap.expand(len(sigma), -1, -1), kernel[:, None, :].expand(-1, size, -1))


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one matrix down and one across each image.

    Args:
        images: float [batch, channels, height, width].
        rows, columns: [batch, new height, height] and [batch, new width, width].
    """
    batch, channels, height, width = images.shape
    across = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], across.view(batch, channels, height, -1))


def affine(images: Tensor, angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Rotate, move, scale and shear about the centre, bilinear, zeros outside, as v2 affine does.

    Args:
        images: float [batch, channels, height, width].
        angle: [batch], degrees, clockwise.
        translate: [batch, 2], pixels to the right and down.
        scale: [batch].
        shear: [batch], degrees along x.
    """
    _, _, height, width = images.shape
    turn, lean = torch.deg2rad(angle), torch.deg2rad(shear)
    cos, sin, tan = turn.cos(), turn.sin(), lean.tan()
    # The forward map is scale * R(turn) * [[1, -tan], [0, 1]]; grid_sample wants its inverse. Both have determinant 1.
    inverse = torch.stack([torch.stack([cos - sin * tan, cos * tan + sin], 1), torch.stack([-sin, cos], 1)], 1)
    inverse = inverse / scale[:, None, None]
    moved = -(inverse @ translate[:, :, None].to(inverse.dtype)).squeeze(2)  # in pixels
    half = constant((width / 2, height / 2), images.device)
    theta = torch.cat([inverse * half[None, None, :] / half[None, :, None], (moved / half)[:, :, None]], 2)
    grid = F.affine_grid(theta.float(), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in HSV. Of the three channels the largest and the least stay, so only chroma times a shape is left.

    One contiguous plane per channel and the fractional part instead of a remainder: 16 us per 32-pixel image on one
    core, where the direct way takes 58.
    """
    red, green, blue = images.transpose(0, 1).contiguous()  # each [batch, height, width]
    low = torch.minimum(torch.minimum(red, green), blue)
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - low
    per = chroma.clamp(min=1e-12).reciprocal_()
    by_green, by_blue = ((blue - red) * per).add_(2), ((red - green) * per).add_(4)
    hue = torch.where(top == red, (green - blue) * per, torch.where(top == green, by_green, by_blue))  # in sixths
    hue.add_((turn * 6)[:, None, None] + 12)
    turned = torch.empty_like(images)
    for channel, shift in enumerate((0.0, 4.0, 2.0)):
        shape = (hue + shift).mul_(1 / 6).frac_().sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1)
        torch.addcmul(low, shape, chroma, out=turned[:, channel])
    return turned


class Colour:
    """A chain of colour changes: one affine map of RGB (or of grey) per sample, `matrix @ rgb + offset`.

    Contrast pulls towards the mean grey of the image as it is at that point of the chain; being linear, that follows
    from the mean colour of the untouched image, so no step needs the pixels.
    """

    def __init__(self, images: Tensor) -> None:
        self._start(images)

    def _start(self, images: Tensor) -> None:
        batch, channels = images.shape[:2]
        self._images = images
        self._mean = images.mean((2, 3))  # [batch, channels]
        luma = LUMA if channels == 3 else (1.0,) * channels
        self._luma = constant(luma, images.device) / (1.0 if channels == 3 else channels)
        self.matrix = torch.eye(channels, device=images.device).repeat(batch, 1, 1)
        self.offset = torch.zeros(batch, channels, device=images.device)

    def brightness(self, factor: Tensor) -> "Colour":
        """Multiply by `factor` [batch]."""
        self.matrix, self.offset = self.matrix * factor[:, None, None], self.offset * factor[:, None]
        return self

    def contrast(self, factor: Tensor) -> "Colour":
        """Blend with the mean grey; `factor` [batch], 1 changes nothing."""
        mean = (torch.bmm(self.matrix, self._mean[:, :, None]).squeeze(2) + self.offset) @ self._luma  # [batch]
        self.brightness(factor)
        self.offset = self.offset + ((1 - factor) * mean)[:, None]
        return self

    def saturation(self, factor: Tensor) -> "Colour":
        """Blend each pixel with its grey; `factor` [batch], 1 changes nothing, 0 is greyscale."""
        if self.matrix.shape[1] != 3:
            return self
        grey = self._luma.expand(3, 3)
        step = factor[:, None, None] * torch.eye(3, device=grey.device) + (1 - factor)[:, None, None] * grey
        return self._then(step)

    def hue(self, turn: Tensor) -> "Colour":
        """Turn the hue; `turn` [batch], -0.5 to 0.5 of a circle. Not linear: the chain so far is applied first."""
        if self.matrix.shape[1] != 3:
            return self
        self._start(_turn_hue(self.apply(), turn))
        return self

    def apply(self) -> Tensor:
        """Give the changed images, not clamped."""
        flat = self._images.flatten(2)  # [batch, channels, height * width]
        return torch.baddbmm(self.offset[:, :, None], self.matrix, flat).view_as(self._images)

    def _then(self, step: Tensor) -> "Colour":
        self.matrix = torch.bmm(step, self.matrix)
        self.offset = torch.bmm(step, self.offset[:, :, None]).squeeze(2)
        return self


def solarise(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what lies at or above `threshold` [batch]; a threshold above 1 changes nothing."""
    return torch.where(images >= threshold[:, None, None, None], 1 - images, images)


def inside_box(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Say which pixels lie in each sample's box: bool [batch, 1, height, width]."""
    row = torch.arange(images.shape[2], device=images.device)
    column = torch.arange(images.shape[3], device=images.device)
    tall = (row >= top[:, None]) & (row < (top + height)[:, None])
    wide = (column >= left[:, None]) & (column < (left + width)[:, None])
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, value: float = 0.0) -> Tensor:
    """Put `value` into a box of each image; a height of 0 changes nothing."""
    return images.masked_fill(inside_box(images, top, left, height, width), value)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Give labels as float32 [batch, classes]; a label of -1 gives zeros."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def mixup(batch: dict[str, Tensor], share: Tensor, partner: Tensor, *, classes: int) -> dict[str, Tensor]:
    """Blend each sample with its partner (Zhang et al., arXiv 1710.09412, eq. 1).

    Args:
        share: [batch], the part of the sample itself.
        partner: int64 [batch], a permutation.

    Returns:
        the batch with "image" blended and "target" [batch, classes], the blended labels.
    """
    images = to_float(batch["image"])
    weight = share[:, None, None, None]
    targets = one_hot(batch["label"], classes)
    blended: dict[str, Any] = {
        "image": images * weight + images[partner] * (1 - weight),
        "target": targets * share[:, None] + targets[partner] * (1 - share)[:, None],
    }
    return {**batch, **blended}


def cutmix(
    batch: dict[str, Tensor], top: Tensor, left: Tensor, height: Tensor, width: Tensor, partner: Tensor, *, classes: int
) -> dict[str, Tensor]:
    """Paste a box of the partner into each sample (Yun et al., arXiv 1905.04899, eq. 1).

    Returns:
        the batch with "image" pasted and "target" [batch, classes], labels by area.
    """
    images = batch["image"]
    box = inside_box(images, top, left, height, width)
    share = 1 - box.float().mean((1, 2, 3))
    targets = one_hot(batch["label"], classes)
    return {
        **batch,
        "image": torch.where(box, images[partner], images),
        "target": targets * share[:, None] + targets[partner] * (1 - share)[:, None],
    }
