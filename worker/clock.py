"""What time is needed for in a run: what the user sees, max_seconds, how often to save. No bit of a weight."""

import contextlib
import math
import time
from collections.abc import Iterator

from app.domain.spec import Training
from worker.parts.tuning import Plan
from worker.report import Progress

SHOW_SECONDS = 1.0
SAVE_SECONDS = 10.0  # at least, between checkpoints at the ends of epochs: the supervisor hashes and stores each
SAVING_SHARE = 0.05  # of the time at most goes into saving


class Clock:
    """The time of one attempt, and of those before it."""

    def __init__(self, plan: Plan, *, before: float, start: int) -> None:
        self.before, self.start = before, start
        self._plan, self._began, self._shown = plan, time.monotonic(), 0.0
        self._saved, self._cost = -math.inf, 0.0

    def used(self) -> float:
        """Give the seconds of training over all attempts."""
        return self.before + time.monotonic() - self._began

    def rate(self, step: int) -> float:
        """Give samples per second in this attempt."""
        return (step - self.start) * self._plan.batch_size / max(time.monotonic() - self._began, 1e-9)

    def steps_per_second(self, step: int) -> float:
        """Give the speed of this attempt."""
        return self.rate(step) / self._plan.batch_size

    def should_show(self) -> bool:
        """Say whether the user has not seen anything for a while."""
        return time.monotonic() - self._shown >= SHOW_SECONDS

    def shown(self, step: int) -> Progress:
        """Give what the user sees, and note when."""
        self._shown = time.monotonic()
        plan, rate = self._plan, self.rate(step)
        left = (plan.steps - step) * plan.batch_size
        return Progress(
            phase="train", fraction=step / plan.steps, step=step, steps=plan.steps,
            epoch=max(math.ceil(step / plan.steps_per_epoch), 1), epochs=plan.epochs,
            samples_per_second=round(rate, 1), eta_seconds=round(left / rate, 1) if rate else None,
        )  # fmt: skip

    def should_save(self, training: Training, step: int, epoch_over: bool) -> bool:
        """Say whether a checkpoint is due after this step."""
        if training.checkpoint_every != "epoch":
            return step % training.checkpoint_every == 0
        return epoch_over and time.monotonic() - self._saved >= max(SAVE_SECONDS, self._cost / SAVING_SHARE)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Note what a checkpoint costs."""
        began = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._cost = self._saved - began
