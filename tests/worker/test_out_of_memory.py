"""Out of memory: the micro-batch is halved where the loss allows it, else the fault says what would fit."""

from pathlib import Path

import pytest

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from tests.worker.objectives import Hungry
from worker.report import Planned, Saved

pytestmark = pytest.mark.worker


def test_out_of_memory_halves_the_micro_batch_and_goes_on(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = Hungry(monkeypatch, most=5)
    heard, last = sets.finished(sets.order(sets.spec(), digits, tmp_path))
    assert heard.codes().count("memory.micro_batch_halved") == 2
    plans = [message.plan for message in heard.of(Planned)]
    assert [plan["accumulate"] for plan in plans] == [1, 2, 4]
    assert {plan["batch_size"] for plan in plans} == {16}
    assert set(hungry.sizes) == {4}
    assert last.outcome == "succeeded"


def test_a_resumed_attempt_keeps_the_halved_micro_batch(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hungry(monkeypatch, most=8)
    body = sets.spec(training={"checkpoint_every": 3})
    first = sets.order(body, digits, tmp_path / "one")
    heard, _ = sets.finished(first, lambda message: "drain" if isinstance(message, Saved) else None)
    later = sets.order(
        body, digits, tmp_path / "two", plan=heard.of(Planned)[0].plan, attempt=2,
        checkpoint=str(Path(first.scratch) / heard.of(Saved)[0].file),
    )  # fmt: skip
    heard, _ = sets.finished(later)
    assert [message.plan["accumulate"] for message in heard.of(Planned)] == [2]
    assert "memory.micro_batch_halved" not in heard.codes()


def test_a_loss_that_couples_its_batch_is_never_split_and_the_fault_names_what_fits(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hungry(monkeypatch, most=20)
    heard, last = sets.failed(sets.order(sets.spec("simclr", training={"batch_size": 64}), digits, tmp_path))
    assert (last.error.fault, last.error.code) == ("resource", "out_of_memory")
    assert last.error.hint == "Set training.batch_size to 16."
    assert [message.plan["checkpoint_activations"] for message in heard.of(Planned)] == [False, True]
