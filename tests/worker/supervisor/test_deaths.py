"""How a run can die: every end has a class."""

import errno
import os
import signal
from typing import Any

import pytest

from worker.supervisor.deaths import failure_of_death, failure_of_supervisor, oom_kills

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("verdict", "code", "out_of_memory", "losses", "expected"),
    [
        (None, -9, False, 0, ("system", "trainer_killed", True)),
        (None, -9, True, 0, ("system", "out_of_memory", True)),
        (None, -9, True, 1, ("system", "out_of_memory", True)),
        (None, -9, True, 2, ("resource", "out_of_memory", False)),
        (None, -11, False, 0, ("system", "trainer_crashed", True)),
        (None, 0, False, 0, ("system", "trainer_exited", True)),
        (None, None, False, 0, ("system", "trainer_killed", True)),
        ("hung", -9, False, 0, ("system", "no_progress", True)),
        ("protocol", -9, False, 0, ("system", "protocol", True)),
    ],
)
def test_the_class_of_a_death(
    verdict: Any, code: int | None, out_of_memory: bool, losses: int, expected: tuple[str, str, bool]
) -> None:
    failure = failure_of_death(verdict, code, out_of_memory=out_of_memory, losses=losses)
    assert (failure.fault, failure.code, failure.retryable) == expected


def test_a_mapped_file_that_was_cut_short_is_hinted_at() -> None:
    failure = failure_of_death(None, -signal.SIGBUS, out_of_memory=False, losses=0)
    assert (failure.fault, failure.code, failure.retryable) == ("system", "trainer_crashed", True)
    assert "cut short" in str(failure.hint)


def test_the_kernels_count_of_memory_kills_is_read() -> None:
    assert oom_kills() >= 0
    assert isinstance(oom_kills(), int)
    assert os.path.exists("/proc/vmstat")


def test_what_breaks_in_the_supervisor_is_a_full_disk_or_worth_another_attempt() -> None:
    full = failure_of_supervisor(OSError(errno.ENOSPC, "No space left on device"))
    assert (full.fault, full.code, full.retryable) == ("resource", "disk_full", False)
    other = failure_of_supervisor(KeyError("secret"))
    assert (other.fault, other.code, other.retryable) == ("system", "supervisor", True)
    assert "secret" not in other.message
