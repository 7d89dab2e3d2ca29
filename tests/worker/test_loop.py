"""The loop against a fake objective: what is called in which order, what is reported, what a checkpoint must hold."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.errors import SystemFault, UserFault
from app.domain.spec import Optimizer, Training
from tests.worker.objectives import Recording, Rows, Small, data, keep_all, plan, same, train
from tests.worker.sets import Heard
from worker import checkpoint, clock
from worker.parts import optim
from worker.recipe import Batch, Progress
from worker.report import Event, Saved
from worker.state import first_not_finite

pytestmark = pytest.mark.worker


def test_the_order_of_calls(tmp_path: Path) -> None:
    module = Recording()

    def prepare(batch: Batch, generator: torch.Generator) -> Batch:
        module.calls.append("prepare")
        return batch

    training = Training(epochs=2, batch_size=4)
    given = replace(data(Rows(8), validation=Rows(6)), prepare=prepare)
    train(module, training, tmp_path, made=plan(training, 8, accumulate=2), with_data=given)
    micro = ["prepare", "forward {0} 2", "backward", "gradient"]

    def step(number: int) -> list[str]:
        calls = [f"at_step {number}", *micro, *micro, "after_backward", "after_step True"]
        return [call.format(number) for call in calls]

    def epoch(number: int) -> list[str]:
        first = 2 * number
        return [f"before_epoch {number} (8, 2)", "sample_weights", *step(first), *step(first + 1), "evaluate"]

    assert module.calls == ["parameter_groups", *epoch(0), *epoch(1)]


def test_nothing_is_read_from_the_device_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *given: Any, original: Any = original) -> Any:
            reads.append(1)
            return original(self, *given)

        monkeypatch.setattr(Tensor, name, counted)
    training = Training(epochs=1, batch_size=1, checkpoint_every=1000)
    counts = []
    for rows in (8, 12):
        reads.clear()
        train(Recording(), training, tmp_path / str(rows), made=plan(training, rows, log_every=50),
              with_data=data(Rows(rows)))  # fmt: skip
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0, "four more steps read nothing more"


def test_seeding_a_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """torch.manual_seed remembers a call with its stack for a GPU that is not there, on every step of a run."""
    before = len(torch.cuda._queued_calls)
    train(Small(), Training(epochs=4, batch_size=4), tmp_path)
    assert len(torch.cuda._queued_calls) == before


def test_the_reported_losses_are_means_over_their_window(tmp_path: Path) -> None:
    class Counting(Recording):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            return {"loss": self.backbone(batch["image"]).mean() * 0 + progress.step}

    training = Training(epochs=1, batch_size=4)
    _, heard = train(Counting(), training, tmp_path, made=plan(training))
    losses = [(step, value) for name, step, value in heard.metrics() if name == "train/loss"]
    assert losses == [(2, 0.5), (3, 2.0)], "a window of two steps, and the rest at the end of the epoch"


@pytest.mark.parametrize(("steps", "looked_at"), [(8, [3, 6, 8]), (2, [2]), (6, [3, 6])])
def test_a_number_of_steps_cuts_the_last_epoch_and_looks_once_more(
    steps: int, looked_at: list[int], tmp_path: Path
) -> None:
    training = Training(epochs=1, steps=steps, batch_size=4)
    made = plan(training, steps=steps, epochs=-(-steps // 3))
    result, heard = train(Small(), training, tmp_path, made=made)
    assert (result.outcome, result.ended_by, result.step) == ("succeeded", "epochs", steps)
    assert [step for name, step, _ in heard.metrics() if name == "validation/accuracy"] == looked_at
    assert [message.step for message in heard.of(Saved)][-1] == steps


@pytest.mark.parametrize("bad_step", [1, 2, 3, 5])  # last of a window, of an epoch; first of a window
def test_a_loss_that_is_not_finite_names_step_rate_and_samples(bad_step: int, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Bad(Recording):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            seen.append(batch["index"])
            loss = self.backbone(batch["image"]).mean()
            return {"loss": loss * (math.nan if progress.step >= bad_step else 1)}

    training = Training(epochs=2, batch_size=4, checkpoint_every=1)
    heard = Heard()
    with pytest.raises(UserFault, match=f"at step {bad_step + 1} ") as raised:
        train(Bad(), training, tmp_path, heard=heard)
    rate = next(value for name, _, value in heard.metrics() if name == "train/learning_rate") if bad_step > 2 else None
    assert "learning rate 0.0" in raised.value.message
    assert rate is None or rate > 0
    for number in seen[bad_step].tolist():
        assert str(number) in raised.value.message
    (event,) = [message for message in heard.of(Event) if message.code == "loss.not_finite"]
    assert event.data == {"step": bad_step + 1, "samples": seen[bad_step].tolist()}
    saved = heard.of(Saved)
    assert [message.step for message in saved] == list(range(1, bad_step + 1)), "the last good checkpoint is kept"
    newest = checkpoint.read(tmp_path / saved[-1].file)
    assert all(value.isfinite().all() for value in newest.part("model").values())


class Spoilt(Recording):
    """From a step on its loss is finite and its gradient is not: the slope of a root at zero."""

    bad_step = 0

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        loss = self.backbone(batch["image"]).square().mean()
        return {"loss": loss + (self.linear.bias.sum() * 0).sqrt() if progress.step >= self.bad_step else loss}


@pytest.mark.parametrize(("every", "kept"), [(1, [1]), (100, [])], ids=["at a checkpoint", "at an epoch's end"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_what_a_step_of_finite_loss_has_spoilt_is_neither_kept_nor_published(
    every: int, kept: list[int], clip: float | None, tmp_path: Path
) -> None:
    module, heard = Spoilt(), Heard()
    module.bad_step = 1 if every == 1 else 2  # the last one of an epoch
    training = Training(epochs=1, batch_size=4, checkpoint_every=every, gradient_clip=clip)
    with pytest.raises(UserFault, match=r"but backbone\.1\.\w+ was not any more by step") as raised:
        train(module, training, tmp_path, heard=heard)
    assert raised.value.code == "loss_not_finite"
    assert f"by step {module.bad_step + 1} (learning rate 0.0" in raised.value.message
    assert [message.step for message in heard.of(Saved)] == kept
    assert "evaluate" not in module.calls


def test_a_statistic_that_is_not_finite_is_found_and_what_is_frozen_is_left() -> None:
    module = Small()
    optimizer = optim.build(optim.groups(module), Optimizer(name="adamw"))
    assert first_not_finite(module, optimizer) is None
    norm = cast(nn.BatchNorm1d, module.backbone[2])
    assert norm.running_var is not None
    norm.running_var[3] = math.inf
    assert first_not_finite(module, optimizer) == "backbone.2.running_var"
    norm.eval()
    assert first_not_finite(module, optimizer) is None
    with torch.no_grad():
        module.head.bias[0] = math.nan
    assert first_not_finite(module, optimizer) == "head.bias"
    module.requires_grad_(requires_grad=False)
    assert first_not_finite(module, optimizer) is None


OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd with momentum": {"optimizer": Optimizer(name="sgd", momentum=0.9, nesterov=True)},
    "muon": {"optimizer": Optimizer(name="muon")},
    "adam, clipped, linear": {"optimizer": Optimizer(name="adam"), "gradient_clip": 0.1, "schedule": "linear"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_any_cut_gives_the_same_bits(options: dict[str, Any], ema: float | None, tmp_path: Path) -> None:
    training = Training(epochs=3, batch_size=4, checkpoint_every=1, **options)
    made = plan(training, optimizer=Optimizer.model_validate(training.optimizer).model_dump())

    def fresh() -> Small:
        module = Small()
        module.ema_decay = ema
        return module

    uninterrupted = fresh()
    result, heard = train(uninterrupted, training, tmp_path / "whole", made=made)
    folder = tmp_path / "kept"
    keep_all(heard_training := Heard(), folder)
    train(fresh(), training, folder, heard=heard_training, made=made)
    for step in range(1, 9):
        resumed = Small(seed=99)
        resumed.ema_decay = ema
        again, heard_again = train(
            resumed, training, tmp_path / f"cut{step}", made=made, newest=folder / f"kept-{step}.safetensors"
        )
        assert same(uninterrupted, resumed), step
        assert heard_again.metrics() == [row for row in heard.metrics() if row[1] > step]
        assert (again.metrics, again.best) == (result.metrics, result.best)


@pytest.mark.parametrize(("cost", "between"), [(0.0, 10.0), (0.2, 10.0), (1.0, 20.0)])
def test_checkpoints_at_the_ends_of_epochs_cost_a_bounded_share(
    cost: float, between: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    class Slow(Recording):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            now[0] += 0.1
            return super().forward(batch, progress)

    def save(message: Any) -> None:
        if isinstance(message, Saved):
            now[0] += cost

    _, heard = train(Slow(), Training(epochs=200, batch_size=4), tmp_path, heard=Heard(save))
    steps = [saved.step for saved in heard.of(Saved)]
    assert steps[0] == 3
    assert steps[-1] == 600
    seconds = [(later - before) / 10 for before, later in pairwise(steps[:-1])]
    assert len(seconds) >= 2
    assert all(between <= each < between + 0.6 for each in seconds), seconds  # epochs of 0.3 s


def test_weights_decide_how_often_a_row_is_drawn(tmp_path: Path) -> None:
    seen: list[int] = []

    class Weighted(Recording):
        def sample_weights(self, labels: Tensor) -> Tensor:
            return 3.0 * (labels == 1) + 1.0 * (labels == 0)

        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            seen.extend(batch["label"].tolist())
            return super().forward(batch, progress)

    train(Weighted(), Training(epochs=100, batch_size=4), tmp_path)
    assert sum(seen) / len(seen) == pytest.approx(0.75, abs=0.05)  # 1,200 draws: four standard deviations


def test_a_checkpoint_of_another_network_does_not_fit(tmp_path: Path) -> None:
    training = Training(epochs=1, batch_size=4)
    _, heard = train(Recording(), training, tmp_path)
    with pytest.raises(SystemFault, match="does not fit"):
        train(Small(), training, tmp_path / "other", newest=tmp_path / heard.of(Saved)[-1].file)


class Sloped(nn.Module):
    """The gradient of its one weight is always 3, so a step says what the optimiser was told."""

    couples_batch = False

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.backbone.weight)
        self.scales = scales

    def at_step(self, progress: Progress) -> dict[str, float]:
        return self.scales

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"loss": 3 * self.backbone.weight.sum()}


@pytest.mark.parametrize(
    ("scales", "given", "step"),
    [
        ({}, {}, 0.1 * 3),
        ({"learning_rate": 0.5}, {}, 0.05 * 3),
        ({"learning_rate": 0.0}, {}, 0.0),
        ({}, {"gradient_clip": 0.2}, 0.1 * 0.2),
        ({}, {"gradient_clip": 50.0}, 0.1 * 3),
        ({}, {"weight_decay": 0.4}, 0.1 * (3 + 0.4)),
        ({"weight_decay": 0.25}, {"weight_decay": 0.4}, 0.1 * (3 + 0.1)),
    ],
)
def test_a_step_is_rate_times_clipped_gradient_and_decay(
    scales: dict[str, float], given: dict[str, Any], step: float, tmp_path: Path
) -> None:
    optimizer = Optimizer(name="sgd", momentum=0.0)
    asked = {"weight_decay": 0.0, **given}
    training = Training(
        epochs=1, batch_size=12, optimizer=optimizer, schedule="constant", warmup_fraction=0, **asked
    )  # fmt: skip
    module = Sloped(scales)
    made = plan(training, optimizer=optimizer.model_dump(), learning_rate=0.1)
    _, heard = train(module, training, tmp_path, made=made, with_data=data(Rows()))
    assert 1 - module.backbone.weight.item() == pytest.approx(step, rel=1e-4, abs=1e-7)
    rates = [value for name, _, value in heard.metrics() if name == "train/learning_rate"]
    assert rates == [pytest.approx(0.1 * scales.get("learning_rate", 1.0))]


def test_gradients_are_clipped_at_their_true_size_under_the_scaler_of_float16(tmp_path: Path) -> None:
    optimizer = Optimizer(name="sgd", momentum=0.0)
    training = Training(
        epochs=1, batch_size=12, optimizer=optimizer, schedule="constant", warmup_fraction=0, weight_decay=0.0,
        gradient_clip=0.2,
    )  # fmt: skip
    module = Sloped({})
    made = plan(training, optimizer=optimizer.model_dump(), learning_rate=0.1, precision="float16")
    train(module, training, tmp_path, made=made, with_data=data(Rows()))
    assert 1 - module.backbone.weight.item() == pytest.approx(0.1 * 0.2, rel=1e-4)


def test_the_rate_that_a_fault_names_is_the_one_that_was_used(tmp_path: Path) -> None:
    class Bad(Sloped):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            return {"loss": super().forward(batch, progress)["loss"] * math.nan}

    training = Training(epochs=1, batch_size=12, schedule="constant", warmup_fraction=0)
    with pytest.raises(UserFault, match=r"at step 1 \(learning rate 0\.025\)"):
        train(Bad({"learning_rate": 0.25}), training, tmp_path, made=plan(training, learning_rate=0.1))
