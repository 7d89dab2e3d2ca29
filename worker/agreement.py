"""What the first process of a run wants, known to all of its processes before the same step."""

from typing import cast

from worker.clock import Clock
from worker.parts import distributed
from worker.report import Wish

SECONDS = 0.25  # between two talks: one costs some 0.3 ms of the hosts' time and none of the devices'


class Agreement:
    """Between talks everybody goes on, so that no step waits for more than the gradients."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._next = clock, 0
        self._held: tuple[Wish, bool] = ("run", False)

    def before(self, step: int, wish: Wish, late: bool) -> tuple[Wish, bool]:
        """Give the wish, and whether the time is over, that hold before `step`; on one process those that are given."""
        if distributed.world_size() == 1:
            return wish, late
        if step >= self._next:
            steps = max(1, int(SECONDS * self._clock.steps_per_second(step)))
            said = cast("tuple[Wish, bool, int]", distributed.from_first((wish, late, steps)))
            self._held, self._next = said[:2], step + said[2]
        return self._held
