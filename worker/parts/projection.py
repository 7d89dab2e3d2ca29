"""Fewer dimensions for an embedding: principal components, computed in pieces."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 8192


@dataclass(frozen=True)
class Components:
    """Axes of largest variance. `values @ axes.T` of centred values gives the coordinates."""

    mean: Tensor  # [d]
    axes: Tensor  # [k, d], orthonormal, by falling variance
    explained: Tensor  # [k], the part of all variance along each

    def apply(self, values: Tensor) -> Tensor:
        """Project [n, d] to float32 [n, k] on the axes' device."""
        return (values.to(self.axes.device) - self.mean) @ self.axes.T


def principal_components(
    values: Tensor, count: int, device: torch.device, tick: Callable[[int], None] = lambda _: None
) -> Components:
    """Find the `count` principal components of `values [n, d]` from their covariance, summed up in float64.

    Each axis points to where its largest coefficient is positive, so that the same data give the same signs.
    """
    rows, dimension = values.shape
    total = torch.zeros(dimension, dtype=torch.float64, device=device)
    squares = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
    centre = values[:CHUNK].to(device).double().mean(0)  # near the mean, so that nothing cancels out below
    for start in range(0, rows, CHUNK):
        part = values[start : start + CHUNK].to(device).double() - centre
        total += part.sum(0)
        squares += part.T @ part
        tick(start)
    mean = total / rows
    variances, vectors = torch.linalg.eigh(squares / rows - torch.outer(mean, mean))
    axes = vectors.T.flip(0)[:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    explained = variances.flip(0).clamp(min=0)
    share = explained[:count] / explained.sum().clamp(min=1e-30)
    return Components((centre + mean).float(), (axes * largest.sign()).float(), share.float())
