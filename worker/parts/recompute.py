"""Activations computed twice instead of kept: time for memory, where a loss does not allow a batch to be split.

Only what goes into each stage of a backbone is kept for the backward pass, and each stage runs again when its turn
comes (Chen et al., arXiv 1604.06174): one more forward pass a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from worker.parts.backbones import Stage, stage_modules


def recompute_stages(backbone: nn.Module) -> None:
    """Make a backbone keep the inputs of its stages instead of all activations; its numbers stay the same.

    The last stage keeps its own: its turn comes first, when nothing has been let go.
    """
    plain, found = backbone.forward, list[Stage]()

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(x)
        if not found:  # not before the first step: until then layers may be exchanged
            found.extend(stage_modules(backbone))
        for stage in found[:-1]:
            again = _again(stage)
            x = checkpoint(stage, x, use_reentrant=False, context_fn=lambda again=again: (nullcontext(), again))
        return found[-1](x)

    backbone.forward = forward


@contextmanager
def _again(stage: Stage) -> Iterator[None]:
    """Let a stage run a second time over the same batch without its batch norms counting it twice.

    They have to save the same tensors as the first time, so the statistics are moved by a part of zero, and what counts
    the batches is a copy.
    """
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
