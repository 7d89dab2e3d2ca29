"""What a window makes of the losses of its steps."""

import pytest
import torch

from worker.parts.window import Window

pytestmark = pytest.mark.worker


def add(window: Window, share: float, **losses: float) -> None:
    window.add({name: torch.tensor(value) for name, value in losses.items()}, share=share)


def test_steps_may_be_of_different_kinds() -> None:
    window = Window(4)
    for losses in ({"loss": 1.0, "accuracy": 0.5}, {"loss": 2.0, "spread": 3.0}, {"loss": 6.0, "accuracy": 1.0}):
        add(window, 1.0, **losses)
        window.close_step()
    assert window.means("") == {"loss": 3.0, "accuracy": 0.75, "spread": 3.0}
    assert window.first_not_finite() is None


def test_so_may_the_micro_batches_of_a_step_whose_mean_is_over_those_that_gave_all() -> None:
    window = Window(4)
    add(window, 0.5, loss=1.0)
    add(window, 0.5, loss=3.0, accuracy=1.0)
    window.close_step()
    assert window.means("") == {"loss": 2.0}
    assert window.first_not_finite() is None
    add(window, 1.0, loss=4.0, accuracy=0.5)
    window.close_step()
    assert window.means("") == {"loss": 3.0, "accuracy": 0.5}
