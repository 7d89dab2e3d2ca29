"""How a run ends: by a wish, early, by the clock, by collapse; and which weights are left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.domain.errors import UserFault
from app.domain.spec import EarlyStopping, Training
from tests.worker.objectives import Recording, Rows, Small, data, plan, same, train, whole
from tests.worker.sets import Heard
from worker import clock
from worker.loop import Result
from worker.recipe import Batch, Progress
from worker.report import Progress as Shown
from worker.report import Saved

pytestmark = pytest.mark.worker


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
        if isinstance(message, Saved) and message.best_step == message.step:
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


class Restless(Recording):
    """A pause is wished for while an epoch is made ready."""

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self._heard = heard

    def before_epoch(self, features_of: Any, progress: Progress) -> list[nn.Parameter]:
        if progress.epoch == 1:
            self._heard.reporter.want("pause")
        return super().before_epoch(features_of, progress)


def test_what_an_epoch_begins_with_is_made_once_whenever_a_pause_comes(tmp_path: Path) -> None:
    training, heard = Training(epochs=3, batch_size=4), Heard()
    module = Restless(heard)
    result, _ = train(module, training, tmp_path, heard=heard)
    assert (result.outcome, result.step) == ("paused", 4), "a step further, so that the epoch has begun"
    again = Recording()
    train(again, training, tmp_path / "again", newest=tmp_path / heard.of(Saved)[-1].file)
    begun = [call.split()[1] for call in module.calls + again.calls if call.startswith("before_epoch")]
    assert begun == ["0", "1", "2"]


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
    result, heard = train(module, training, tmp_path)
    assert (result.ended_by, result.epoch) == ("early_stopping", 4)
    assert heard.of(Shown)[-1].epoch == 4  # of the last step, not of the one that never came
    assert result.best is not None
    assert (result.best["metric"], result.best["step"]) == ("validation/loss", 6)
    assert result.best["value"] == pytest.approx(0.5)
    assert torch.equal(module.linear.weight, module.snapshots[1])


def test_a_checkpoint_says_which_step_is_the_best_even_where_that_was_not_saved(tmp_path: Path) -> None:
    result, heard = train(Scripted([0.9, 0.1, 0.5]), Training(epochs=3, batch_size=4), tmp_path)
    assert (result.best or {})["step"] == 6
    assert [(saved.step, saved.best_step) for saved in heard.of(Saved)] == [(3, 3), (9, 6)]


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
    training = Training(epochs=2, batch_size=4, early_stopping=EarlyStopping(metric="validation/top_accuracy"))
    with pytest.raises(UserFault, match=r"no 'validation/top_accuracy'; it has .*validation/accuracy"):
        train(Small(), training, tmp_path)


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("validation/loss", "no validation samples"), ("probe/knn_accuracy", "no probes"),
        ("test/accuracy", "nothing of that name"),
        ("train/learning_rate", "whether 'train/learning_rate' is to rise or to fall"),
        ("train/acuracy", "Did you mean something like accuracy"),
    ],
)  # fmt: skip
def test_what_a_run_will_never_measure_is_refused_before_its_first_step(metric: str, says: str, tmp_path: Path) -> None:
    module = Recording()
    training = Training(epochs=2, batch_size=4, early_stopping=EarlyStopping(metric=metric))
    with pytest.raises(UserFault, match=says) as raised:
        train(module, training, tmp_path, with_data=data(Rows()))
    assert raised.value.code == "unknown_metric"
    assert not [call for call in module.calls if call.startswith("forward")]


def test_a_loss_that_is_a_sum_of_opposed_ones_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Recording()
    module.opponents = {"one": ("backbone",)}  # type: ignore[assignment]
    training = Training(epochs=2, batch_size=4, early_stopping=EarlyStopping(metric="train/loss"))
    with pytest.raises(UserFault, match="opponents"):
        train(module, training, tmp_path, with_data=data(Rows()))
    assert not [call for call in module.calls if call.startswith("forward")]


def test_what_training_does_not_change_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Recording()
    module.fixed_numbers = ("purity",)  # type: ignore[assignment]
    training = Training(epochs=2, batch_size=4, early_stopping=EarlyStopping(metric="train/purity"))
    with pytest.raises(UserFault, match="which training does not change"):
        train(module, training, tmp_path, with_data=data(Rows()))
    assert not [call for call in module.calls if call.startswith("forward")]


class Probed(Recording):
    """What it measures on its features follows a script, probe by probe."""

    def __init__(self, name: str, script: list[float]) -> None:
        super().__init__()
        self.name, self.script, self.snapshots = name, iter(script), list[Tensor]()

    def probed(self, _: Tensor) -> dict[str, float]:
        self.snapshots.append(self.linear.weight.detach().clone())
        return {self.name: next(self.script)}


def pretrained(module: nn.Module, metric: str, folder: Path, *, epochs: int = 6) -> Result:
    training = Training(epochs=epochs, batch_size=4, early_stopping=EarlyStopping(metric=metric, patience=2))
    given = replace(data(Rows()), probe=whole(Rows()))
    made = plan(training, probe_every=1)
    return train(module, training, folder, made=made, with_data=given, kind="pretrain")[0]


@pytest.mark.parametrize(
    ("name", "script", "best"),
    [
        ("frechet_distance", [50.0, 30.0, 20.0, 25.0, 26.0, 20.0], 2), ("alignment", [0.3, 0.2, 0.25, 0.25, 0.2], 1),
        ("effective_rank", [5.0, 9.0, 8.0, 7.0, 9.0], 1), ("nmi", [0.1, 0.4, 0.3, 0.2, 0.4], 1),
        ("purity", [0.1, 0.4, 0.3, 0.2, 0.4], 1),
    ],
)  # fmt: skip
def test_a_run_stops_when_its_metric_gets_worse_whichever_way_that_is(
    name: str, script: list[float], best: int, tmp_path: Path
) -> None:
    module = Probed(name, script)
    result = pretrained(module, f"probe/{name}", tmp_path)
    assert (result.ended_by, result.epoch) == ("early_stopping", best + 3)
    assert result.best is not None
    assert result.best["value"] == script[best]
    assert torch.equal(module.linear.weight, module.snapshots[best])


def test_the_numbers_of_a_pretrained_model_are_those_of_the_weights_that_are_kept(tmp_path: Path) -> None:
    module = Probed("elbo", [-5.0, -2.0, -3.0, -4.0, -2.0])
    result = pretrained(module, "probe/elbo", tmp_path)
    assert torch.equal(module.snapshots[-1], module.snapshots[1]), "probed once more, with the best weights"
    assert result.metrics["probe/elbo"] == -2.0


def test_weights_that_are_kept_are_probed_where_their_epoch_was_not(tmp_path: Path) -> None:
    training = Training(epochs=6, batch_size=4, early_stopping=EarlyStopping(metric="train/loss"))
    heard = Heard(lambda message: "stop" if isinstance(message, Saved) and message.step == 3 else None)
    given, made = replace(data(Rows()), probe=whole(Rows())), plan(training, probe_every=4)
    result, _ = train(Small(), training, tmp_path, heard=heard, with_data=given, made=made, kind="pretrain")
    assert (result.outcome, result.step, (result.best or {})["step"]) == ("stopped", 3, 3)
    assert "probe/knn_accuracy" not in {name for name, _, _ in heard.metrics()}
    assert "probe/knn_accuracy" in result.metrics


def test_an_unknown_probe_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserFault, match="no 'probe/knn_5_accuracy'; it has probe/alignment, probe/effective_rank"):
        pretrained(Probed("alignment", [0.1]), "probe/knn_5_accuracy", tmp_path)


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
