"""An exponential moving average of a network's weights, which is validated and exported in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of every floating-point parameter and buffer of a module; other buffers are left as they are.

    The decay is warmed up as `min(decay, (1 + updates) / (10 + updates))`, so that a short run is not ruled by its
    random start (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        self.weights: dict[str, Tensor] = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights by one step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.weights.values()), list(self._live.values()), 1 - decay)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the module for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """Put the average into the module for good."""
        for name, live in self._live.items():
            live.copy_(self.weights[name])

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Go on from a saved average."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
        self.updates = updates

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live.items():
            held = live.clone()
            live.copy_(self.weights[name])
            self.weights[name].copy_(held)
