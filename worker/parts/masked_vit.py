"""A vision transformer that sees some patches of an image, and the small transformer that paints the others."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock


def patches_of(images: Tensor, patch: int) -> Tensor:
    """Cut images [batch, channels, size, size] into [batch, patches, patch * patch * channels], row by row."""
    return nn.functional.unfold(images, patch, stride=patch).transpose(1, 2)


def images_of(patches: Tensor, patch: int, size: int) -> Tensor:
    """Undo `patches_of`."""
    return nn.functional.fold(patches.transpose(1, 2), (size, size), patch, stride=patch)


def sine_cosine(side: int, width: int) -> Tensor:
    """Give fixed positions [side * side, width] of a square of patches: half tells the row, half the column.

    Sines and cosines of Vaswani et al., arXiv 1706.03762, section 3.5, in two dimensions; `width` divides by four.
    """
    rate = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate  # [side, width / 4]
    place = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    row, column = place[:, None].expand(-1, side, -1), place[None].expand(side, -1, -1)
    return torch.cat([row, column], 2).flatten(0, 1).float()


def places(side: int, width: int) -> Tensor:
    """Give `sine_cosine` less its mean over the patches, which tells no place.

    Of a few patches a side most waves hardly change, so nearly all of their length is that mean: beside it the first
    layers see little of what the patches hold.
    """
    found = sine_cosine(side, width)
    return found - found.mean(0)


def encode_visible(backbone: nn.Module, images: Tensor, visible: Tensor) -> Tensor:
    """Run torchvision's ViT on the class token and the patches numbered in `visible` [batch, kept] alone.

    Returns:
        tokens [batch, 1 + kept, width], after the last norm; with all patches the first is what the backbone gives.
    """
    vit = cast(Any, backbone)
    tokens = vit._process_input(images) + vit.encoder.pos_embedding[:, 1:]  # [batch, patches, width]
    tokens = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
    first = (vit.class_token + vit.encoder.pos_embedding[:, :1]).expand(len(tokens), -1, -1)
    return vit.encoder.ln(vit.encoder.layers(vit.encoder.dropout(torch.cat([first, tokens], 1))))


class PatchDecoder(nn.Module):
    """From the tokens of visible patches to the pixels of all, through a mask token and fixed positions."""

    def __init__(self, tokens: int, *, width: int, depth: int, heads: int, side: int, pixels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(tokens, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(heads, width, 4 * width, 0.0, 0.0) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.paint = nn.Linear(width, pixels)
        positions = torch.cat([torch.zeros(1, width), places(side, width)])  # the class token has none
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, encoded: Tensor, restore: Tensor) -> Tensor:
        """Paint every patch: [batch, patches, pixels].

        Args:
            encoded: [batch, 1 + kept, tokens], the class token first.
            restore: int64 [batch, patches]: where each patch lies among the visible ones followed by the masked ones.
        """
        known = self.embed(encoded)
        width, hidden = known.shape[2], restore.shape[1] + 1 - known.shape[1]
        patches = torch.cat([known[:, 1:], self.mask_token.to(known.dtype).expand(len(known), hidden, -1)], 1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, width))
        tokens = torch.cat([known[:, :1], patches], 1) + self.get_buffer("positions")
        return self.paint(self.norm(self.blocks(tokens))[:, 1:])


def least_visible(patches: int, mask_ratio: float) -> int:
    """Count the patches that stay visible."""
    return math.floor(patches * (1 - mask_ratio) + 1e-9)
