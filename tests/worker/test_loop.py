"""The loop against a fake objective: what is called in which order, how a run ends, and what a checkpoint must hold."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.errors import SystemFault, UserFault
from app.domain.spec import EarlyStopping, Optimizer, Training
from tests.worker.sets import Heard
from worker import checkpoint, clock, loop
from worker.checkpoint import Checkpoints
from worker.data.source import Data, Part, part
from worker.loop import Result
from worker.parts.seed import reseed
from worker.parts.tuning import Plan
from worker.recipe import Batch, Progress
from worker.report import Saved

pytestmark = pytest.mark.worker
CPU = torch.device("cpu")


class Rows:
    """Twelve fixed rows of two classes."""

    slow = False

    def __init__(self, count: int = 12) -> None:
        draws = torch.Generator().manual_seed(5)
        self.pixels = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=draws)
        self.labels = torch.arange(count) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        return {"image": self.pixels[rows], "label": self.labels[rows], "index": rows + 100}


def whole(rows: Rows) -> Part:
    return part(rows, torch.arange(len(rows)))


def data(rows: Rows, *, validation: Rows | None = None) -> Data:
    return Data(whole(rows), whole(validation) if validation else None, None, None, torch.zeros(1), torch.ones(1))


def plan(training: Training, samples: int = 12, **given: Any) -> Plan:
    batch = int(training.batch_size) if training.batch_size != "auto" else 4
    per_epoch = samples // batch
    made = Plan(
        device="cpu", threads=1, precision="float32", memory_format="contiguous", float32_matmul="highest",
        compile=False, deterministic=True, batch_size=batch, accumulate=1, learning_rate=0.05,
        optimizer=Optimizer(name="adamw").model_dump(), epochs=training.epochs, steps_per_epoch=per_epoch,
        steps=per_epoch * training.epochs, samples=samples, image_size=4, channels=1, mean=(0.0,), std=(1.0,),
        cache="memory_map", log_every=2,
    )  # fmt: skip
    return made.model_copy(update=given)


class Small(nn.Module):
    """A linear classifier with dropout and a buffer that every step moves."""

    couples_batch = False
    ema_decay: float | None = None

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        reseed(seed)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = self.head(self.backbone(batch["image"]))
        assert isinstance(self.queue, Tensor)
        self.queue.copy_(torch.cat([self.queue[1:], logits.detach().mean()[None]]))
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return {"loss": loss + 0.01 * logits.mean() * self.queue.mean(), "spread": logits.std()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"logits": self.head(self.backbone(batch["image"]))}


def train(
    module: nn.Module, training: Training, folder: Path, *, heard: Heard | None = None, newest: Path | None = None,
    made: Plan | None = None, with_data: Data | None = None, kind: str = "finetune",
) -> tuple[Result, Heard]:  # fmt: skip
    heard = heard or Heard()
    checkpoints = Checkpoints(folder, heard.reporter, newest=newest)
    given = with_data or data(Rows(), validation=Rows(6))
    result = loop.train(
        module, given, training, made or plan(training), CPU, heard.reporter, checkpoints, kind=kind
    )  # fmt: skip
    return result, heard


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


class Recording(nn.Module):
    """An objective with every optional member, which writes down when it is called."""

    couples_batch = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        self.linear.weight.register_hook(lambda _: self.calls.append("backward"))
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: self.calls.append("gradient"))

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self.backbone[1])

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        self.calls.append("parameter_groups")
        return [{"names": ["backbone"], "lr_scale": 1.0}]

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        self.calls.append("sample_weights")
        return None

    def before_epoch(self, features_of: Any, progress: Progress) -> list[nn.Parameter]:
        self.calls.append(f"before_epoch {progress.epoch} {tuple(features_of().shape)}")
        return [cast(nn.Parameter, self.linear.weight)]

    def at_step(self, progress: Progress) -> dict[str, float]:
        self.calls.append(f"at_step {progress.step}")
        return {"learning_rate": 0.5, "weight_decay": 0.0}

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self.calls.append(f"forward {progress.step} {len(batch['image'])}")
        return {"loss": self.backbone(batch["image"]).square().mean()}

    def after_backward(self, progress: Progress) -> None:
        self.calls.append("after_backward")
        self.weight_before = self.linear.weight.clone()

    def after_step(self, progress: Progress) -> None:
        moved = not torch.equal(self.weight_before, self.linear.weight)
        self.calls.append(f"after_step {moved}")

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        assert not self.training
        self.calls.append("evaluate")
        return {"loss": self.backbone(batch["image"]).square().mean(1)}


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
    saved = heard.of(Saved)
    assert [message.step for message in saved] == list(range(1, bad_step + 1)), "the last good checkpoint is kept"
    newest = checkpoint.read(tmp_path / saved[-1].file)
    assert all(value.isfinite().all() for value in newest.part("model").values())


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


def keep_all(heard: Heard, folder: Path) -> None:
    """Keep a copy of every checkpoint, which the run itself would remove."""
    folder.mkdir()
    send = heard.reporter.send

    def copying(message: Any) -> None:
        if isinstance(message, Saved):
            (folder / f"kept-{message.step}.safetensors").write_bytes((folder / message.file).read_bytes())
        send(message)

    heard.reporter.send = copying  # type: ignore[method-assign]


@pytest.mark.parametrize(("wish", "outcome"), [("pause", "paused"), ("drain", "drained"), ("stop", "stopped")])
def test_a_wish_is_honoured_at_the_next_step_with_a_checkpoint(wish: str, outcome: str, tmp_path: Path) -> None:
    training = Training(epochs=4, batch_size=4, checkpoint_every=1000)
    heard = Heard(lambda message: wish if getattr(message, "code", "") == "train.first_step" else None)
    module = Small()
    result, _ = train(module, training, tmp_path, heard=heard)
    assert (result.outcome, result.step) == (outcome, 1)
    assert [saved.step for saved in heard.of(Saved)] == [1]
    if wish == "stop":
        return
    resumed, whole_run = Small(seed=9), Small()
    again, _ = train(resumed, training, tmp_path / "on", newest=tmp_path / "checkpoint-000000001.safetensors")
    train(whole_run, training, tmp_path / "whole")
    assert again.outcome == "succeeded"
    assert same(resumed, whole_run)


def test_a_cancel_keeps_nothing(tmp_path: Path) -> None:
    training = Training(epochs=4, batch_size=4, checkpoint_every=1000)
    heard = Heard(lambda message: "cancel" if getattr(message, "code", "") == "train.first_step" else None)
    result, _ = train(Small(), training, tmp_path, heard=heard)
    assert result.outcome == "cancelled"
    assert heard.of(Saved) == []
    assert list(tmp_path.iterdir()) == []


def test_a_stop_before_the_first_step_is_a_cancel(tmp_path: Path) -> None:
    heard = Heard()
    heard.reporter.want("stop")
    result, _ = train(Small(), Training(epochs=1, batch_size=4), tmp_path, heard=heard)
    assert result.outcome == "cancelled"


def test_a_stop_gives_the_best_weights_so_far(tmp_path: Path) -> None:
    training = Training(epochs=30, batch_size=4, checkpoint_every=1)
    best: dict[int, dict[str, Tensor]] = {}
    module = Small()

    def at_fifth_epoch(message: Any) -> str | None:
        if isinstance(message, Saved) and message.best:
            best[message.step] = {name: value.clone() for name, value in module.state_dict().items()}
        return "stop" if isinstance(message, Saved) and message.step == 16 else None

    result, heard = train(
        module, training, tmp_path, heard=Heard(at_fifth_epoch), made=plan(training, learning_rate=0.5)
    )  # fmt: skip
    assert result.outcome == "stopped"
    assert result.best is not None
    assert result.best["metric"] == "validation/accuracy"
    accuracies = [value for name, _, value in heard.metrics() if name == "validation/accuracy"]
    assert result.best["value"] == max(value for value in accuracies if value is not None)
    kept = best[result.best["step"]]
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_a_wish_after_the_last_step_comes_too_late(tmp_path: Path) -> None:
    heard = Heard(lambda message: "cancel" if isinstance(message, Saved) and message.step == 3 else None)
    result, _ = train(Small(), Training(epochs=1, batch_size=4), tmp_path, heard=heard)
    assert result.outcome == "succeeded"


class Scripted(Recording):
    """Its validation loss follows a script, epoch by epoch."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script, self.epoch, self.snapshots = script, 0, list[Tensor]()

    def before_epoch(self, features_of: Any, progress: Progress) -> list[nn.Parameter]:
        self.epoch = progress.epoch
        return []

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        if len(self.snapshots) <= self.epoch:
            self.snapshots.append(self.linear.weight.detach().clone())
        return {"loss": torch.full((len(batch["label"]),), self.script[self.epoch])}


def test_early_stopping_waits_its_patience_and_restores_the_best(tmp_path: Path) -> None:
    module = Scripted([1.0, 0.5, 0.49, 0.6, 0.7, 0.1])
    training = Training(
        epochs=6, batch_size=4, early_stopping=EarlyStopping(metric="validation/loss", patience=2, min_delta=0.1)
    )
    result, _ = train(module, training, tmp_path)
    assert (result.ended_by, result.epoch) == ("early_stopping", 4)
    assert result.best is not None
    assert (result.best["metric"], result.best["step"]) == ("validation/loss", 6)
    assert result.best["value"] == pytest.approx(0.5)
    assert torch.equal(module.linear.weight, module.snapshots[1])


def test_without_early_stopping_the_last_weights_are_kept(tmp_path: Path) -> None:
    module = Scripted([0.1, 0.5, 0.9])
    result, _ = train(module, Training(epochs=3, batch_size=4), tmp_path)
    assert result.best is not None
    assert result.best["step"] == 3
    assert torch.equal(module.linear.weight, module.snapshots[2])


def test_a_run_that_stopped_early_does_not_go_on_when_resumed(tmp_path: Path) -> None:
    stopping = EarlyStopping(metric="validation/loss", patience=1)
    training = Training(epochs=5, batch_size=4, early_stopping=stopping)
    result, heard = train(Scripted([0.5, 0.6, 0.1, 0.1, 0.1]), training, tmp_path)
    again, _ = train(
        Scripted([0.0] * 5), training, tmp_path / "again", newest=tmp_path / heard.of(Saved)[-1].file
    )  # fmt: skip
    assert (again.step, again.ended_by) == (result.step, "early_stopping")


def test_an_unknown_metric_names_those_there_are(tmp_path: Path) -> None:
    training = Training(epochs=2, batch_size=4, early_stopping=EarlyStopping(metric="validation/acuracy"))
    with pytest.raises(UserFault, match="validation/accuracy"):
        train(Small(), training, tmp_path)


def test_max_seconds_counts_over_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    class Slow(Recording):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            now[0] += 1.0
            return super().forward(batch, progress)

    training = Training(epochs=10, batch_size=4, max_seconds=5, checkpoint_every=1)
    heard = Heard(lambda message: "pause" if isinstance(message, Saved) and message.step == 3 else None)
    train(Slow(), training, tmp_path, heard=heard)
    result, _ = train(Slow(), training, tmp_path, newest=tmp_path / "checkpoint-000000003.safetensors")
    assert (result.step, result.ended_by, result.outcome) == (5, "max_seconds", "succeeded")


def test_checkpoints_at_the_ends_of_epochs_cost_a_bounded_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    class Slow(Recording):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            now[0] += 0.1
            return super().forward(batch, progress)

    def save(message: Any) -> None:
        if isinstance(message, Saved):
            now[0] += 0.2

    _, heard = train(Slow(), Training(epochs=40, batch_size=4), tmp_path, heard=Heard(save))
    steps = [saved.step for saved in heard.of(Saved)]
    assert steps[0] == 3
    assert steps[-1] == 120
    assert all(later - before >= 40 for before, later in pairwise(steps[:-1])), steps


def test_weights_decide_how_often_a_row_is_drawn(tmp_path: Path) -> None:
    seen: list[int] = []

    class Weighted(Recording):
        def sample_weights(self, labels: Tensor) -> Tensor:
            return (labels == 1).float()

        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            seen.extend(batch["label"].tolist())
            return super().forward(batch, progress)

    train(Weighted(), Training(epochs=3, batch_size=4), tmp_path)
    assert set(seen) == {1}


def test_a_collapsed_representation_is_reported_once(tmp_path: Path) -> None:
    class Collapsed(Recording):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.linear.weight)
            nn.init.ones_(self.linear.bias)

        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            return {"loss": self.backbone(batch["image"]).mean() * 0.0}

    training = Training(epochs=3, batch_size=4, weight_decay=0)
    rows = Rows()
    given = replace(data(rows), probe=whole(rows))
    _, heard = train(
        Collapsed(), training, tmp_path, made=plan(training, probe_every=1), with_data=given, kind="pretrain"
    )  # fmt: skip
    assert heard.codes().count("representation.collapsed") == 1
    stopping = training.model_copy(update={"stop_on_collapse": True})
    result, _ = train(
        Collapsed(), stopping, tmp_path / "stop", made=plan(stopping, probe_every=1), with_data=given, kind="pretrain"
    )  # fmt: skip
    assert (result.outcome, result.ended_by, result.epoch) == ("stopped", "collapse", 1)
    _, heard = train(
        Small(), training, tmp_path / "fine", made=plan(training, probe_every=1), with_data=given, kind="pretrain"
    )  # fmt: skip
    assert "representation.collapsed" not in heard.codes()
    names = {name for name, _, _ in heard.metrics()}
    assert {"probe/effective_rank", "probe/feature_spread", "probe/knn_accuracy", "probe/linear_accuracy"} <= names


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
