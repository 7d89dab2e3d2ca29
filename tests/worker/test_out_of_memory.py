"""Out of memory: in training a smaller micro-batch where the loss allows it, else the fault says what would fit;
elsewhere smaller pieces, and no word of it.
"""

import io
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import ResourceFault
from app.domain.spec import Training
from tests.worker import sets
from tests.worker.objectives import CPU, Hungry, Rows, data, plan, whole
from worker import evaluate
from worker.recipe import Batch, Progress
from worker.report import Event, Failed, Planned, Saved
from worker.supervisor.deaths import OUT_OF_MEMORY
from worker.trainer import assembly, ranks, training

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


def test_after_a_kill_for_memory_the_next_attempt_takes_less(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = Hungry(monkeypatch, most=16)
    heard, last = sets.finished(sets.order(sets.spec(), digits, tmp_path, attempt=2, spare_memory=True))
    assert [message.plan["accumulate"] for message in heard.of(Planned)] == [1, 2]
    assert (set(hungry.sizes), last.outcome) == ({8}, "succeeded")
    assert "memory.micro_batch_halved" in heard.codes()


def test_after_a_kill_for_memory_with_nothing_left_to_spare_it_is_tried_as_it_is(
    digits: DatasetFacts, tmp_path: Path
) -> None:
    """Another process may have taken the memory."""
    body = sets.spec(training={"batch_size": 3, "steps": 2})
    heard, last = sets.finished(sets.order(body, digits, tmp_path, attempt=2, spare_memory=True))
    assert [message.plan["accumulate"] for message in heard.of(Planned)] == [1]
    assert last.outcome == "succeeded"


def test_a_run_that_goes_on_after_a_kill_for_memory_does_not_end_with_the_same_bits(
    digits: DatasetFacts, tmp_path: Path
) -> None:
    body = sets.spec(training={"checkpoint_every": 3})
    first = sets.order(body, digits, tmp_path / "one")
    heard, _ = sets.finished(first, lambda message: "drain" if isinstance(message, Saved) else None)
    later = sets.order(
        body, digits, tmp_path / "two", plan=heard.of(Planned)[0].plan, attempt=2, spare_memory=True,
        checkpoint=str(Path(first.scratch) / heard.of(Saved)[0].file),
    )  # fmt: skip
    heard, _ = sets.finished(later)
    assert [(message.plan["accumulate"], message.exact) for message in heard.of(Planned)] == [(1, True), (2, False)]


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


def test_a_run_whose_memory_ran_out_on_the_way_does_not_end_with_the_same_bits(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = Hungry(monkeypatch, most=16)

    def another_comes(message: object) -> None:
        if isinstance(message, Saved):
            hungry.most = 8

    heard, _ = sets.finished(sets.order(sets.spec(training={"checkpoint_every": 3}), digits, tmp_path), another_comes)
    assert [(message.plan["accumulate"], message.exact) for message in heard.of(Planned)] == [(1, True), (2, False)]
    (event,) = [event for event in heard.of(Event) if event.code == "resume.inexact"]
    assert event.data["differs"] == ["accumulate"]


def test_killed_between_the_smaller_micro_batch_and_its_first_checkpoint_the_run_goes_on_with_it(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = Hungry(monkeypatch, most=16)
    body = sets.spec(training={"checkpoint_every": 3})
    first, planned, saved = sets.order(body, digits, tmp_path / "one"), list[Planned](), list[Saved]()

    def die(message: object) -> None:
        if isinstance(message, Saved):
            saved.append(message)
            hungry.most = 8
        if isinstance(message, Planned):
            planned.append(message)
            if len(planned) == 2:
                raise sets.Killed

    with pytest.raises(sets.Killed):
        sets.carry_out(first, die)
    assert ([each.plan["accumulate"] for each in planned], len(saved)) == ([1, 2], 1)
    hungry.sizes.clear()
    later = sets.order(
        body, digits, tmp_path / "two", plan=planned[1].plan, attempt=2,
        checkpoint=str(Path(first.scratch) / saved[0].file),
    )  # fmt: skip
    heard, _ = sets.finished(later)
    assert [(message.plan["accumulate"], message.exact) for message in heard.of(Planned)] == [(2, False)]
    assert set(hungry.sizes) == {8}
    assert "memory.micro_batch_halved" not in heard.codes(), "it is not found out a second time"
    (event,) = [event for event in heard.of(Event) if event.code == "resume.inexact"]
    assert event.data["differs"] == ["accumulate"]


def test_a_loss_that_couples_its_batch_is_never_split_and_the_fault_names_what_fits(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hungry(monkeypatch, most=20)
    heard, last = sets.failed(sets.order(sets.spec("simclr", training={"batch_size": 64}), digits, tmp_path))
    assert (last.error.fault, last.error.code) == ("resource", "out_of_memory")
    assert last.error.hint == "Set training.batch_size to 16."
    assert [message.plan["checkpoint_activations"] for message in heard.of(Planned)] == [False, True]


@pytest.mark.parametrize(
    ("batch", "most", "accumulate"), [(20, 4, [1, 2, 4, 10]), (100, 5, [1, 2, 4, 10, 20]), (27, 9, [1, 3])]
)
def test_the_next_micro_batch_is_the_largest_divisor_up_to_half(
    batch: int, most: int, accumulate: list[int], digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = Hungry(monkeypatch, most=most)
    heard, _ = sets.finished(sets.order(sets.spec(training={"batch_size": batch, "epochs": 1}), digits, tmp_path))
    plans = [message.plan for message in heard.of(Planned)]
    assert [found["accumulate"] for found in plans] == accumulate
    assert {found["batch_size"] for found in plans} == {batch}
    assert set(hungry.sizes) == {batch // accumulate[-1]}


@pytest.mark.parametrize(("most", "hint"), [(4, "Set training.batch_size to 3."), (0, "Use a smaller network")])
def test_where_nothing_divides_the_batch_the_hint_is_a_size_that_was_tried(
    most: int, hint: str, digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hungry(monkeypatch, most=most)
    _, last = sets.failed(sets.order(sets.spec(training={"batch_size": 31}), digits, tmp_path))
    assert (last.error.fault, last.error.code) == ("resource", "out_of_memory")
    assert last.error.message == "A micro-batch of 31 does not fit into memory."
    assert (last.error.hint or "").startswith(hint)


class Narrow:
    """Make a network run out of memory in passes without gradients over more than some images, like a GPU does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.sizes = most, list[int]()
        real = assembly.assemble

        def assemble(*given: Any, **named: Any) -> Any:
            made = real(*given, **named)
            cast(nn.Module, made.objective.backbone).register_forward_pre_hook(self._look)
            return made

        monkeypatch.setattr(training, "assemble", assemble)

    def _look(self, module: nn.Module, given: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            return
        if len(given[0]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.sizes.append(len(given[0]))


EXACT = {"precision": "float32", "checkpoint_every": 5}


@pytest.mark.parametrize(
    ("recipe", "batch", "most"), [("image_classification", 16, 7), ("simclr", 32, 33)],
    ids=["validation and test", "probes, views and pictures"],
)  # fmt: skip
def test_evaluation_goes_in_smaller_pieces_by_itself_and_finds_the_same(
    recipe: str, batch: int, most: int, digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = sets.spec(recipe, training={**EXACT, "batch_size": batch})
    plain = sets.order(body, digits, tmp_path / "plain")
    _, expected = sets.finished(plain)
    narrow = Narrow(monkeypatch, most)
    order = sets.order(body, digits, tmp_path / "narrow")
    heard, last = sets.finished(order)
    assert not [code for code in heard.codes() if code.startswith("memory.")]
    assert len(heard.of(Planned)) == 1
    assert 0 < max(narrow.sizes) <= most
    assert last.metrics == pytest.approx(expected.metrics, rel=1e-3)
    assert sets.weights_sha256(order) == sets.weights_sha256(plain)


@pytest.mark.parametrize("validates", [True, False], ids=["while training", "after the last step"])
def test_evaluation_that_does_not_fit_at_all_is_not_answered_by_smaller_micro_batches(
    validates: bool, digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Narrow(monkeypatch, most=0)
    body = sets.spec(data={"validation_fraction": 0.1 if validates else 0})
    heard, last = sets.failed(sets.order(body, digits, tmp_path))
    assert (last.error.fault, last.error.code, last.error.phase) == (
        "resource", "out_of_memory", "evaluate" if validates else "train",
    )  # fmt: skip
    assert "out of memory" in last.error.message.lower()
    assert not [code for code in heard.codes() if code.startswith("memory.")]
    assert len(heard.of(Planned)) == 1


class Lossy(nn.Module):
    """An objective that says nothing of single samples and has room for some of them."""

    couples_batch = True

    def __init__(self, most: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(16, 1)
        self.most, self.sizes = most, list[int]()

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self.sizes.append(len(batch["image"]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return {"loss": batch["image"].mean()}


@pytest.mark.parametrize(("most", "sizes"), [(12, [12]), (7, [12, 6, 6]), (4, [12, 6, 4, 4, 4])])
def test_a_loss_of_whole_batches_is_measured_in_pieces_that_training_takes(most: int, sizes: list[int]) -> None:
    rows, module, made = Rows(), Lossy(most), plan(Training(batch_size=4))
    found = evaluate.outputs(module, whole(rows), data(rows), made, CPU, lambda *_: None)
    assert module.sizes == sizes
    assert found["loss"].mean().item() == pytest.approx(rows.pixels.float().mean().item() / 255, rel=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.outputs(Lossy(3), whole(rows), data(rows), made, CPU, lambda *_: None)


def test_what_another_process_could_not_evaluate_is_no_reason_for_smaller_micro_batches() -> None:
    for phase, kind in (("evaluate", ResourceFault), ("train", MemoryError)):
        processes = object.__new__(ranks._Ranks)
        processes._lost, processes._codes = threading.Event(), {}
        processes._lost.set()
        fault = ResourceFault("Out of memory.", code="out_of_memory", phase=phase)
        processes._failures = {1: fault.failure("train")}
        assert isinstance(processes.fault(within=0.0), kind)


def test_memory_that_ran_out_in_another_process_alone_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first process waits in a collective for ever, all end, and the next attempt takes less."""
    said = ResourceFault("Out of memory.", code="out_of_memory", phase="train").failure("train").model_dump_json()
    other = SimpleNamespace(stdout=io.StringIO(f"{said}\n"), wait=lambda: 1, kill=lambda: None)
    heard, processes = sets.Heard(), object.__new__(ranks._Ranks)
    processes._over, processes._lost, processes._codes = threading.Event(), threading.Event(), {}
    processes._failures, processes._reporter, processes._processes = {}, heard.reporter, cast(Any, {1: other})
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(ranks.os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        processes._listen(1)
    (failed,) = heard.of(Failed)
    assert (failed.error.fault, failed.error.code, failed.error.retryable) == ("system", OUT_OF_MEMORY, True)


def test_what_a_failed_step_held_is_free_before_anything_else_is_tried(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    train, choose = training.loop.train, training.let_go

    def once(*args: Any, **given: Any) -> Any:
        if held:
            return train(*args, **given)
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("CUDA error: out of memory") from error

    def looked(error: BaseException) -> None:
        alive.append(held[0]() is not None)
        choose(error)
        alive.append(held[0]() is not None)

    monkeypatch.setattr(training.loop, "train", once)
    monkeypatch.setattr(training, "let_go", looked)
    heard, _ = sets.finished(sets.order(sets.spec(), digits, tmp_path))
    assert "memory.micro_batch_halved" in heard.codes()
    assert alive == [True, False]
