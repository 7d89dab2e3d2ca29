"""Backbones on images smaller than those they were built for: which take them, how small, and their features."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torchvision.models as tv
from torch import Tensor, nn

SMALLEST = 24  # below that, 3/7 of the image are too few pixels for any of our networks
_SHARE = 3 / 7  # 96 of 224 pixels, as in DINO


def smaller_size(facts: Mapping[str, Any], image_size: int) -> int:
    """Choose a smaller size that a network of these published facts takes, near 3/7; else the image's own.

    Perceptrons and MaxViT take one size only. A vision transformer's is a multiple of its patch.
    """
    patch = facts["patch"] or 1
    if facts["family"] == "mlp" or image_size < SMALLEST or (facts["family"] == "hierarchical" and patch > 1):
        return image_size
    unit = 1
    if facts["family"] == "vit":
        unit = patch if patch > 4 else 16  # small_vit's own patch is an option: 2, 4, 8 or 16
    size = max(unit, round(_SHARE * image_size / unit) * unit)
    return size if facts["min_image_size"] <= size < image_size else image_size


def features_of(backbone: nn.Module, images: Tensor) -> Tensor:
    """Give the features [batch, d] of images of any size that the backbone can be brought to take.

    A vision transformer's positions are interpolated; the last pool of small_cnn, which is as large as its map, takes
    what map there is.
    """
    if isinstance(backbone, tv.VisionTransformer):
        return _tokens(backbone, images)
    if isinstance(backbone, nn.Sequential) and isinstance(dict(backbone.named_children()).get("pool"), nn.MaxPool2d):
        for name, layer in backbone.named_children():
            if name == "pool":
                return images.amax((2, 3))
            images = layer(images)
    return backbone(images)


def _tokens(vit: tv.VisionTransformer, images: Tensor) -> Tensor:
    if images.shape[-1] == vit.image_size:
        return vit(images)
    patches = cast(nn.Module, vit.conv_proj)(images).flatten(2).transpose(1, 2)  # [batch, patches, width]
    tokens = torch.cat([vit.class_token.expand(len(images), -1, -1), patches], 1)
    whole = vit.encoder.pos_embedding
    side = images.shape[-1] // vit.patch_size
    before = round((whole.shape[1] - 1) ** 0.5)
    square = whole[:, 1:].transpose(1, 2).unflatten(2, (before, before))
    resized = _resized(square, side)
    tokens = tokens + torch.cat([whole[:, :1], resized.flatten(2).transpose(1, 2)], 1)
    return vit.encoder.ln(vit.encoder.layers(vit.encoder.dropout(tokens)))[:, 0]


def _resized(square: Tensor, side: int) -> Tensor:
    """Interpolate [1, width, before, before] bicubically to [1, width, side, side], float32.

    By two products, because CUDA sums the gradient of torch's own `interpolate` in another order every time.
    """
    before = square.shape[-1]
    unit = torch.eye(before, device=square.device)[None, None]
    line = nn.functional.interpolate(unit, size=(side, before), mode="bicubic", align_corners=True)[0, 0]
    with torch.autocast(square.device.type, enabled=False):
        return line @ square.float() @ line.T


def takes(backbone: nn.Module, *, channels: int, size: int) -> bool:
    """Try whether a backbone gives features of images of this size."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            return features_of(backbone, torch.zeros(1, channels, size, size)).shape == (
                1,
                cast(Any, backbone).dimension,
            )
    except (RuntimeError, ValueError, AssertionError):
        return False
    finally:
        backbone.train(was_training)
