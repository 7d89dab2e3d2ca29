"""The other process of a run: it fails alone, and as on GPUs it hangs when it leaves the group that the first is in."""

import os
import time
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from app.domain.errors import DataFault
from worker.recipe import Progress
from worker.trainer import ranks, training

STEP = 3
real = training.start


def start(*given: Any, **named: Any) -> Any:
    """Make the objective fail after some steps."""
    made = real(*given, **named)

    def fail(progress: Progress) -> None:
        if progress.step == STEP:
            raise DataFault("Row 7 is broken.", code="broken_row")

    made.objective.after_step = fail  # type: ignore[assignment]
    return made


def hang(*_: Any, **__: Any) -> None:
    """Wait for what never comes, but end the test."""
    time.sleep(20)
    os._exit(9)


if __name__ == "__main__":
    training.start = start
    dist.destroy_process_group = hang
    distributed_c10d._abort_process_group = hang
    os._exit(ranks.follow(training.follow))
