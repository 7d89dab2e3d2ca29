"""The losses of the last few steps, kept on the device so that no step waits for a number.

Steps of different kinds may give different numbers: a mean is one over the steps that gave it. Where several processes
train together each keeps its own losses, and reading them is done by all at once.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from worker.parts import distributed


class Window:
    """The losses of the last few steps, on the device: [size, names]."""

    def __init__(self, size: int) -> None:
        self.names: list[str] = []
        self._size, self._rows = size, list[Tensor]()
        self._open: Tensor | None = None
        self._shared = 0  # rows that are means over all processes already

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether it is time to look."""
        return len(self._rows) >= self._size

    def add(self, losses: Mapping[str, Tensor], *, share: float) -> None:
        """Add a micro-batch's share to the step that is under way."""
        self._know(losses)
        given = {name: value.detach().float() for name, value in losses.items()}
        row = torch.stack([given[name] if name in given else given["loss"] * math.nan for name in self.names]) * share
        self._open = row if self._open is None else self._open + row

    def _know(self, losses: Mapping[str, Tensor]) -> None:
        """Widen what was kept by the names that are new."""
        if new := sorted(losses.keys() - set(self.names)):
            self.names = [*self.names, *new]
            self._rows = [_widened(row, len(new)) for row in self._rows]
            self._open = None if self._open is None else _widened(self._open, len(new))

    def close_step(self) -> None:
        """End the step that is under way."""
        assert self._open is not None
        self._rows.append(self._open)
        self._open = None

    def means(self, prefix: str) -> dict[str, float]:
        """Give the mean of every loss that a step of the window gave; reads from the device."""
        values = self.values().double().nanmean(0).tolist()
        told = zip(self.names, values, strict=True)
        return {f"{prefix}{name}": value for name, value in told if not math.isnan(value)}

    def last(self, name: str) -> float | None:
        """Give this loss of the newest step, None where it gave no such; reads from the device."""
        if name not in self.names or not self._rows:
            return None
        value = self.values()[-1, self.names.index(name)].item()
        return None if math.isnan(value) else value

    def first_not_finite(self) -> int | None:
        """Give the first step of the window whose loss is not finite; reads from the device."""
        if not self._rows:
            return None
        bad = ~self.values()[:, self.names.index("loss")].isfinite()
        return int(bad.int().argmax()) if bool(bad.any()) else None

    def values(self) -> Tensor:
        """Give all rows, as means over all processes: [steps, names]."""
        if not self._rows:
            return torch.empty(0, len(self.names))
        if self._shared < len(self._rows) and distributed.world_size() > 1:
            self._rows[self._shared :] = distributed.mean(torch.stack(self._rows[self._shared :])).unbind(0)
        self._shared = len(self._rows)
        return torch.stack(self._rows)

    def load(self, values: Tensor, names: list[str], device: torch.device) -> None:
        """Go on from saved `values()`.

        Raises:
            RuntimeError: they are not the losses of these names.
        """
        if len(values) and values.shape[1] != len(names):
            raise RuntimeError(f"{values.shape[1]} losses of each step were kept, and {len(names)} names")
        self.names, self._rows, self._shared = names, list(values.to(device)), len(values)

    def clear(self) -> None:
        """Begin anew."""
        self._rows.clear()
        self._shared = 0


def _widened(row: Tensor, names: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, names), value=math.nan)
