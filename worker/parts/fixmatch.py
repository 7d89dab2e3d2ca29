"""FixMatch: what a network says with confidence of a weakly changed image is the label of a strongly changed copy.

Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel: FixMatch: Simplifying Semi-Supervised Learning with
Consistency and Confidence, 2020, arXiv 2001.07685.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.parts import distributed


def consistency(weak: Tensor, strong: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Give the terms of the sum in equation 4, and which samples are confident enough to count: each [batch].

    Args:
        weak, strong: logits of the two views, [batch, classes]; no gradient flows into the first.
        threshold: the paper's tau; samples whose largest probability is below have a term of 0.
    """
    with torch.no_grad():
        confidence, target = weak.float().softmax(1).max(1)
        confident = confidence >= threshold
    return F.cross_entropy(strong.float(), target, reduction="none") * confident, confident


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Average `values` [batch] over the chosen rows (bool [batch]) of all processes; 0 where there are none.

    Processes may hold different numbers of them; the mean of what they get is the mean over all rows.
    """
    count = distributed.mean(chosen.sum().float())
    return (values * chosen).sum() / count.clamp(min=1 / distributed.world_size())
