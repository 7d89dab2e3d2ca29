"""Learning-rate schedules as pure functions of how much of the run is done, so that a resumed run cannot drift."""

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "linear", "step", "triangular"]

_PEAK = 0.23  # of the triangle, with its ends: airbench94 (github.com/KellerJordan/cifar10-airbench)
_START, _END = 0.2, 0.07


def scale(schedule: Schedule, fraction: float, warmup_fraction: float = 0.0) -> float:
    """Give the factor on the peak learning rate when `fraction` (0 to 1) of the run is done.

    Warm-up rises linearly from 0; the rest of the run then follows the named curve: `cosine` and `linear` fall to 0,
    `step` divides by ten after one and after two thirds, `triangular` rises to its peak at 23 % or at the end of
    warm-up, whichever is later, and falls to 7 %.
    """
    if schedule == "triangular":
        peak = max(_PEAK, warmup_fraction)
        if fraction < peak:
            return _START + (1 - _START) * fraction / peak
        return 1 + (_END - 1) * (fraction - peak) / max(1 - peak, 1e-12)
    if fraction < warmup_fraction:
        return fraction / warmup_fraction
    rest = (fraction - warmup_fraction) / max(1 - warmup_fraction, 1e-12)
    match schedule:
        case "cosine":
            return (1 + math.cos(math.pi * min(rest, 1.0))) / 2
        case "linear":
            return max(0.0, 1 - rest)
        case "step":
            return 0.1 ** int(min(rest, 0.999999) * 3)
        case "constant":
            return 1.0
