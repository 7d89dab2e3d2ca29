"""Principal components of points, scaled to one variance."""

import torch
from torch import Tensor

LEAST = 1e-4  # of the largest variance; a direction below holds little but rounding, which whitening would blow up


@torch.no_grad()
def whitening(points: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Give shift [d] and matrix [d, e] so that `(points - shift) @ matrix` is white, for float32 points [n, d].

    e is `dimension`, or less where the points do not vary in so many directions; at least 1.
    """
    with torch.autocast(points.device.type, enabled=False):
        shift = points.mean(0)
        covariance = torch.zeros(len(shift), len(shift), dtype=torch.float64, device=points.device)
        for part in points.split(8192):
            centred = part - shift
            covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / len(points))  # ascending
    kept = max(1, min(dimension, int((values > LEAST * values[-1]).sum())))
    values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
    # The sign of an eigenvector is chance; the largest entry positive is the same everywhere.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return shift, (vectors * largest.sign() / values.clamp(min=1e-12).sqrt()).float()
