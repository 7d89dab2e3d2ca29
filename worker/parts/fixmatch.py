"""FixMatch: what a network says with confidence of a weakly changed image is the label of a strongly changed copy.

Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel: FixMatch: Simplifying Semi-Supervised Learning with
Consistency and Confidence, 2020, arXiv 2001.07685. A threshold that follows the network: Wang et al.: FreeMatch:
Self-adaptive Thresholding for Semi-supervised Learning, 2023, arXiv 2205.07246.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.parts import distributed

PAPER_THRESHOLD = 0.95
MEMORY = 0.999  # FreeMatch's lambda


def consistency(weak: Tensor, strong: Tensor, *, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the terms of the sum in equation 4, which samples are confident enough to count, and how confident each is.

    Args:
        weak, strong: logits of the two views, [batch, classes]; no gradient flows into the first.
        threshold: the paper's tau; samples whose largest probability is below have a term of 0.

    Returns:
        three tensors [batch].
    """
    with torch.no_grad():
        confidence, target = weak.float().softmax(1).max(1)
        confident = confidence >= threshold
    return F.cross_entropy(strong.float(), target, reduction="none") * confident, confident, confidence


def follow(threshold: Tensor, confidence: Tensor, *, steps: int) -> None:
    """Move the threshold towards the mean confidence of a step, in place, up to the paper's (FreeMatch, equation 5).

    It remembers a tenth of the run, and never more than FreeMatch's 1,000 steps: those would be all of a short one.
    """
    memory = max(0.0, min(MEMORY, 1 - 10 / max(steps, 1)))
    threshold.lerp_(confidence.to(threshold), 1 - memory).clamp_(max=PAPER_THRESHOLD)


def mean_over(values: Tensor, chosen: Tensor, part: Tensor) -> Tensor:
    """Average `values` [batch] over the chosen rows (bool [batch]) of a whole batch; 0 where there are none.

    Micro-batches and processes may hold different numbers of them. `part`, a scalar, is the part that is chosen of what
    this process has of the whole batch; the mean of what all micro-batches and processes get is the mean over the rows.
    """
    return (values * chosen).sum() / (len(values) * distributed.mean(part)).clamp(min=1e-6)
