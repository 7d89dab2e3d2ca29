"""How a run can die, and what that means for its job: user, resource or system, worth another attempt or not. Pure
but for the kernel's counter."""

import signal
from pathlib import Path
from typing import Literal

from app.domain.errors import Failure
from app.domain.jobs import MAX_CONSECUTIVE_LOSSES
from worker.disk import is_full

OUT_OF_MEMORY = "out_of_memory"  # the code of a trainer that the kernel ended; the next attempt spares memory

# Why a trainer was killed by its own supervisor.
Verdict = Literal["fenced", "hung", "protocol", "cancelled", "drained", "silent"]


def failure_of_supervisor(error: Exception) -> Failure:
    """Class what went wrong in the supervisor itself: a full disk, or something that another attempt may not meet."""
    if is_full(error):
        return Failure(
            fault="resource", code="disk_full", message=f"The disk of the worker is full: {error}.",
            hint="Free some space, or lower TUNEYARD_CACHE_BYTES, then /retry.", phase="publish",
        )  # fmt: skip
    return Failure(
        fault="system", code="supervisor", message=f"The worker failed beside the trainer: {type(error).__name__}.",
        hint="The worker's log tells more.", phase="run", retryable=True,
    )  # fmt: skip


def failure_of_death(verdict: Verdict | None, code: int | None, *, out_of_memory: bool, losses: int) -> Failure:
    """Class the end of a trainer that said no last word. `code` is its exit code, negative for a signal."""
    hint = None
    if verdict == "hung":
        name, message = "no_progress", "The trainer made no progress for too long and was ended."
    elif verdict == "protocol":
        name, message = "protocol", "The trainer said something that is no report."
    elif out_of_memory:
        message = "The trainer was killed because the machine ran out of memory."
        hint = "Submit it again with a smaller training.batch_size."
        if losses + 1 >= MAX_CONSECUTIVE_LOSSES:  # though each attempt spared more than the one before
            return Failure(fault="resource", code=OUT_OF_MEMORY, message=message, hint=hint, phase="run")
        name = OUT_OF_MEMORY
    elif code is None or code == -signal.SIGKILL:
        name, message = "trainer_killed", "The trainer was killed."
    elif code < 0:
        name, message = "trainer_crashed", f"The trainer crashed ({_signal_name(-code)})."
        if code == -signal.SIGBUS:
            hint = "A file that it had mapped into memory was cut short, or cannot be read: look at the disk."
    else:
        name, message = "trainer_exited", f"The trainer exited with code {code} without a result."
    return Failure(fault="system", code=name, message=message, hint=hint, phase="run", retryable=True)


def oom_kills() -> int:
    """Read how many processes the kernel has killed for want of memory; 0 where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
