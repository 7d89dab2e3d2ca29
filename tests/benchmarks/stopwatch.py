"""Where the time of a training run goes, section by section, seen from outside of the loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from worker import evaluate, loop
from worker.checkpoint import Checkpoints
from worker.data.policy import View
from worker.data.source import Data, Part
from worker.parts import compute, optim
from worker.parts.ema import Average
from worker.parts.window import Window
from worker.report import Reporter
from worker.trainer.assembly import Assembly

INSIDE = ("forward", "backward", "optimiser")
OUTSIDE = ("reading", "augmentation", "hooks", "pseudo-labels", "health", "validation", "reporting", "checkpoints")
REST = "rest"  # of the loop, between all sections


class Stopwatch:
    """Seconds by section. What happens within a section is its own, but for augmentation within a forward pass."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._open, self._since = clock, [REST], clock()
        self.seconds: dict[str, float] = dict.fromkeys((*INSIDE, *OUTSIDE, REST), 0.0)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what happens here as `name`, unless a section that keeps its own is open."""
        if self._open[-1] != REST and (self._open[-1], name) != ("forward", "augmentation"):
            yield
            return
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Give the seconds so far, those of the open section included."""
        self._charge()
        return dict(self.seconds)

    def _charge(self) -> None:
        now = self._clock()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def clock_of(device: torch.device) -> Callable[[], float]:
    """Give a clock that waits for the device, so that its work counts where it was asked for."""

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return settled


@contextmanager
def watching(made: Assembly, watch: Stopwatch) -> Iterator[None]:
    """Let every part of the loop that has a name of its own tell the stopwatch, as long as this lasts."""
    objective: Any = made.objective
    places: dict[str, list[tuple[Any, str]]] = {
        "forward": [(objective, "forward")],
        "backward": [(torch.Tensor, "backward")],
        "optimiser": [(optim.Optimizers, name) for name in ("schedule", "unscale", "step", "zero_grad")],
        "reading": [(Part, "batch"), (loop, "draw_order")],
        # A View within a forward pass is the GAN's: it augments what the discriminator sees, real or not.
        "augmentation": [(Data, "ready"), (compute, "laid_out"), (View, "__call__")],
        "hooks": [*((objective, name) for name in ("at_step", "after_backward", "after_step")), (Average, "update"),
                  (torch.nn.utils, "clip_grad_norm_")],
        "pseudo-labels": [(objective, "before_epoch")],
        "health": [(evaluate, "probe")],
        "validation": [(evaluate, "outputs"), (evaluate, "measure")],
        "reporting": [(Reporter, "send"), *((Window, name) for name in ("add", "means", "first_not_finite"))],
        "checkpoints": [(loop, "pack"), (Checkpoints, "save")],
    }  # fmt: skip
    with ExitStack() as undo:
        for section, found in places.items():
            for owner, name in found:
                if hasattr(owner, name):
                    undo.enter_context(_told(watch, section, owner, name))
        yield


@contextmanager
def _told(watch: Stopwatch, section: str, owner: Any, name: str) -> Iterator[None]:
    """Put a function in place of another that it calls within a section."""
    kept, call = vars(owner).get(name), getattr(owner, name)

    @wraps(call)
    def timed(*args: Any, **given: Any) -> Any:
        with watch.section(section):
            return call(*args, **given)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        if kept is None:  # a method of the class, seen through the object
            delattr(owner, name)
        else:
            setattr(owner, name, kept)
