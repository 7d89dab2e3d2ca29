"""The layers after a backbone: from features `[batch, d]` to `[batch, outputs]`, linear or with hidden layers."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from worker.parts.small_networks import ACTIVATIONS


def build_head(
    dimension: int,
    outputs: int,
    *,
    hidden: Sequence[int] = (),
    activation: str = "relu",
    dropout: float = 0.0,
    bias: bool = True,
) -> nn.Module:
    """Build a head; dropout comes before every linear layer but the first of a head with hidden layers.

    `bias` is the last layer's (MaxViT's classifier has none).
    """
    layers: list[nn.Module] = []
    before = dimension
    for width in hidden:
        layers += [nn.Linear(before, width), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        before = width
    last = nn.Linear(before, outputs, bias=bias)
    if layers:
        return nn.Sequential(*layers, last)
    return nn.Sequential(nn.Dropout(dropout), last) if dropout else last


def projector(*widths: int, norm_last: bool = False) -> nn.Sequential:
    """Build a projector of these widths, [batch, first] to [batch, last]: linear layers without bias, and batch
    norm and ReLU between them, with `norm_last` a batch norm behind the last one too.

    Methods that compare views put it behind a backbone, and throw it away afterwards.
    """
    layers: list[nn.Module] = []
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers[: -1 if norm_last else -2])


def without_dropout(head: nn.Module) -> nn.Module:
    """Give the same layers (not copies) as they are exported: dropout has no weights and would only shift the names."""
    if not isinstance(head, nn.Sequential):
        return head
    kept = [layer for layer in head if not isinstance(layer, nn.Dropout)]
    return kept[0] if len(kept) == 1 else nn.Sequential(*kept)
