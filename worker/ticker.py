"""Signs of life from long work that has no steps: at most one message a second."""

import time

from worker.report import Progress, Reporter

SECONDS = 1.0


class Ticker:
    """Call it as often as you like with how much is done; a supervisor takes silence for a hung run."""

    def __init__(self, reporter: Reporter, phase: str, *, fraction: float = 0.0) -> None:
        """`fraction` is how much of the whole job is done while this phase lasts."""
        self._reporter, self._phase, self._fraction = reporter, phase, fraction
        self._told = time.monotonic()

    def __call__(self, done: int = 0, total: int | None = None) -> None:
        """Note that `done` of `total` is done."""
        now = time.monotonic()
        if now - self._told >= SECONDS:
            self._told = now
            self._reporter.send(Progress(phase=self._phase, fraction=self._fraction, step=done, steps=total))
