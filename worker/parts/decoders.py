"""Decoders: from a code back to an image, for the recipes that reconstruct or generate."""

from itertools import pairwise

from torch import Tensor, nn

from worker.parts.small_networks import ACTIVATIONS


class Decoder(nn.Module):
    """From a code [batch, d] to an image: a small map, doubled and convolved until it is large enough."""

    def __init__(self, code: int, *, channels: int, size: int) -> None:
        super().__init__()
        start, doublings = size, 0
        while start > 4:
            start, doublings = -(-start // 2), doublings + 1
        widths = [max(32, 128 >> number) for number in range(doublings + 1)]
        self._shape, self._size = (widths[0], start, start), size
        self.first = nn.Linear(code, widths[0] * start * start)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.GELU(), nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after)]
        self.layers = nn.Sequential(*layers, nn.GELU(), nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(self.first(code).unflatten(1, self._shape))[:, :, : self._size, : self._size]


def mirrored(encoder: nn.Module, code: int, *, channels: int, size: int) -> nn.Sequential:
    """Build an `mlp` backwards: its widths in reverse and its activation.

    From a code [batch, d] to [batch, channels, size, size].
    """
    widths = [layer.out_features for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    activation = next(type(layer) for layer in encoder.modules() if isinstance(layer, tuple(ACTIVATIONS.values())))
    layers: list[nn.Module] = []
    for before, after in pairwise([code, *reversed(widths)]):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(
        *layers, nn.Linear(widths[0], channels * size**2), nn.Unflatten(1, (channels, size, size))
    )  # fmt: skip
