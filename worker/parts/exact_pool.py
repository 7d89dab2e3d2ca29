"""Average pooling to a given size whose gradient CUDA computes in the same order every time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExactPool(nn.Module):
    """Adaptive average pooling whose gradient CUDA can compute deterministically: as two products with averages.

    torch has one only for a single output pixel, and refuses the others under `use_deterministic_algorithms`.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = height, width

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return pool_by_products(x, *self.size)
        return F.adaptive_avg_pool2d(x, self.size)


def pool_by_products(x: Tensor, height: int, width: int) -> Tensor:
    """Average-pool `[batch, channels, h, w]` to `[batch, channels, height, width]`, windows as in adaptive pooling."""
    rows, columns = (_averages(size, wanted, x) for size, wanted in zip(x.shape[2:], (height, width), strict=True))
    return rows @ x @ columns.T


def _averages(size: int, wanted: int, like: Tensor) -> Tensor:
    windows = torch.zeros(wanted, size, dtype=like.dtype, device=like.device)
    for number in range(wanted):
        start, end = number * size // wanted, -(-(number + 1) * size // wanted)
        windows[number, start:end] = 1 / (end - start)
    return windows
