"""What CUDA sums in another order every time, and torch therefore refuses or warns of where runs shall repeat."""

from typing import Any

from torch import Tensor

# Backward passes, from the documentation of torch.use_deterministic_algorithms.
_REFUSED = (
    "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "FractionalMaxPool", "MaxUnpool",
    "UpsampleLinear", "UpsampleBilinear", "UpsampleBicubic", "UpsampleTrilinear", "ReflectionPad", "NllLoss2D",
    "CtcLoss", "EmbeddingBag", "Put", "GridSampler",
)  # fmt: skip


def unordered(loss: Tensor) -> list[str]:
    """Give the names of those backward passes of a loss that have no deterministic form on CUDA."""
    found, left = set[Any](), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return sorted(node.name() for node in found if node.name().startswith(_REFUSED))
