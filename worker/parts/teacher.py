"""A teacher: a copy of the student that is not trained but follows it, as a moving average of its weights.

Only parameters are averaged. Its batch norm works with the statistics of each batch and keeps running ones of its own,
as in the code of both BYOL and DINO: averaged statistics would belong to other weights than the averaged ones.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# The part of a run that a teacher may remember, where nobody says how much: 1 / (1 - momentum) steps. With the papers'
# 0.996 it remembers 250 steps, which is 0.1 % of their runs, but all of a short one: the student would be taught by the
# random start until the end.
REMEMBERED = 1 / 3


def teacher_of(*students: nn.Module) -> nn.Sequential:
    """Copy modules that are applied one after another; the copy takes no gradients and drops nothing out."""
    teacher = copy.deepcopy(nn.Sequential(*students)).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
    return teacher


@torch.no_grad()
def follow(teacher: nn.Sequential, *students: nn.Module, momentum: float) -> None:
    """Move a teacher's parameters towards its students': momentum * teacher + (1 - momentum) * student."""
    wanted: list[Tensor] = [parameter for student in students for parameter in student.parameters()]
    followers: list[Tensor] = list(teacher.parameters())
    torch._foreach_lerp_(followers, wanted, 1 - momentum)


def momentum(start: float | None, *, step: int, steps: int, paper: float) -> float:
    """Give the teacher's momentum at this step: from `start` along half a cosine to 1 (BYOL, section 3.3).

    Without `start` it is the paper's, but in a short run no more than lets the teacher remember REMEMBERED of the run.
    """
    if start is None:
        start = max(0.0, min(paper, 1 - 1 / (REMEMBERED * max(steps, 1))))
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2
