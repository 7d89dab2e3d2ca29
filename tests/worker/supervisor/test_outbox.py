"""What waits to be written."""

from typing import Any, cast

import pytest

from worker.supervisor.outbox import Outbox

pytestmark = pytest.mark.unit


def test_numbers_of_steps_that_will_be_done_again_are_dropped() -> None:
    waiting = Outbox(cast(Any, None), cast(Any, None), 0.0)
    waiting.rows.extend(("train/loss", step, 1.0) for step in (99, 100, 105))
    waiting.forget_after(100)
    assert [step for _, step, _ in waiting.rows] == [99, 100]
