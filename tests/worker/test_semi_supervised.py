"""Labelled and unlabelled rows together: whose turn it is, what is drawn, and what it is good for."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from app.domain.spec import Optimizer, Training
from tests.worker import objectives, sets
from tests.worker.half_labelled import job, made
from worker import loop
from worker.checkpoint import Checkpoints
from worker.data.order import draw_order
from worker.data.source import Data, Part
from worker.finetune import semi_supervised
from worker.finetune.semi_supervised import SemiSupervisedParams, Turns
from worker.recipe import Batch, Info, Params, Progress, Recipe
from worker.report import Failed, Finished, Message, Saved
from worker.trainer.assembly import Assembly

pytestmark = pytest.mark.worker
CPU = torch.device("cpu")


def trained(assembly: Assembly, folder: Path) -> dict[str, Tensor]:
    heard = sets.Heard()
    loop.train(
        assembly.objective, assembly.data, assembly.spec.training, assembly.plan, CPU, heard.reporter,
        Checkpoints(folder, heard.reporter), kind="finetune",
    )  # fmt: skip
    return assembly.objective.state_dict()


@pytest.mark.parametrize(("ratio", "turns"), [(1.0, "SUSUSU"), (2.0, "SUUSUU"), (0.5, "SSUSSU"), (3.0, "SUUUSU")])
def test_whose_turn_it_is(ratio: float, turns: str) -> None:
    taken = Turns(Fraction(ratio))
    assert "".join("S" if taken.is_supervised(step) else "U" for step in range(6)) == turns
    inner = [taken.unsupervised(Progress(step, 6, 0, 1)) for step in range(6) if turns[step] == "U"]
    assert [(each.step, each.steps) for each in inner] == [(n, turns.count("U")) for n in range(turns.count("U"))]


class Parts(nn.Module):
    def __init__(self, *parts: float) -> None:
        super().__init__()
        self.labelled_part = lambda step: parts[step % len(parts)]


def test_a_step_draws_as_many_labelled_rows_as_its_part_says_evenly_spread() -> None:
    labels = torch.full((40,), -1)
    labels[torch.tensor([3, 9, 27])] = torch.tensor([0, 1, 0])
    plan = objectives.plan(Training(epochs=2, batch_size=8), 40)

    def drawn(seed: int, epoch: int) -> Tensor:
        order = draw_order(Parts(1.0, 0.0, 0.25), labels, plan, seed=seed, epoch=epoch)
        return order.view(plan.steps_per_epoch, 8)

    first = drawn(0, 0)
    known = labels[first] >= 0
    assert known.sum(1)[[0, 2, 3]].tolist() == [8, 2, 8]
    assert known[2].view(2, 4).sum(1).tolist() == [1, 1], "two processes get one each"
    assert set(first[0].tolist()) == {3, 9, 27}
    assert len(set(first[[1, 4]].flatten().tolist())) == 16, "a permutation of all rows"
    assert torch.equal(first, drawn(0, 0))
    assert not torch.equal(first, drawn(0, 1))
    assert not torch.equal(first, drawn(1, 0))
    assert (labels[drawn(0, 1)] >= 0).sum(1)[[0, 1, 3, 4]].tolist() == [2, 8, 2, 8], "the turns go on"


class Other(nn.Module):
    """An unsupervised objective that writes down what is asked of it."""

    couples_batch = True
    calls: list[str] = []  # noqa: RUF012

    def __init__(self, params: Any, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        assert "label" not in batch
        self.calls.append(f"unsupervised {progress.step} of {progress.steps}")
        return {"loss": (self.scale * self.backbone(batch["image"])).square().mean(), "spread": self.scale * 2}

    def at_step(self, progress: Progress) -> dict[str, float]:
        self.calls.append(f"at_step {progress.step}")
        return {"weight_decay": 0.5}

    def after_backward(self, progress: Progress) -> None:
        self.calls.append(f"after_backward {progress.step}")

    def after_step(self, progress: Progress) -> None:
        self.calls.append(f"after_step {progress.step}")

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        return [{"names": ["scale"], "lr_scale": 3.0}]


def recipe_of(build: Any) -> Recipe:
    return Recipe("other", "pretrain", "1", "", (), Params, build=build)


def info_with(build: Any) -> Info:
    return Info(
        task="image_classification", classes=("a", "b"), samples=12, channels=1, image_size=4, feature_dimension=8,
        architecture={"family": "mlp"}, recipe=lambda name: recipe_of(build),
    )  # fmt: skip


class Flat(nn.Sequential):
    head_bias, keep_stages = True, None


def alternating(build: Any = Other, **params: Any) -> Any:
    backbone = Flat()
    backbone.add_module("flatten", nn.Flatten())
    backbone.add_module("0", nn.Linear(16, 8))
    given = SemiSupervisedParams.model_validate({"objective": "other", **params})
    return semi_supervised.SemiSupervised(given, backbone, info_with(build))


def test_micro_batches_of_fixmatch_add_up_to_the_batch(tmp_path: Path) -> None:
    """Two of four have no labelled row: each counts by what it holds of the whole batch."""
    states: list[dict[str, Tensor]] = []
    curves: list[dict[str, float | None]] = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        module = alternating(None, objective="fixmatch", objective_params={"threshold": 0.6}, ratio=7.0, ema=None)
        rows = objectives.Rows(32)
        part = Part(rows, torch.arange(32), torch.where(torch.arange(32) < 4, rows.labels, -1))
        given = replace(
            Data(part, None, None, None, torch.zeros(1), torch.ones(1)),
            prepare=lambda batch, _: {**batch, "image_strong": batch["image"].flip(3)},
        )
        asked = Training(epochs=3, batch_size=16, optimizer=Optimizer(name="sgd"), weight_decay=0)
        plan = objectives.plan(asked, 32, accumulate=accumulate, optimizer=Optimizer(name="sgd").model_dump())
        result, _ = objectives.train(module, asked, tmp_path / str(accumulate), made=plan, with_data=given)
        states.append(module.state_dict())
        curves.append(result.metrics)
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, atol=1e-6), name
    assert curves[1] == {name: pytest.approx(value, abs=1e-6) for name, value in curves[0].items()}
    assert 0 < cast(float, curves[0]["train/confident"]) < 1


def test_supervised_and_unsupervised_steps_alternate_and_hooks_reach_their_own(tmp_path: Path) -> None:
    module = alternating(ratio=2, weight=0.5)
    rows = objectives.Rows()
    part = Part(rows, torch.arange(12), torch.where(torch.arange(12) < 4, rows.labels, -1))
    Other.calls.clear()
    given = Data(part, objectives.whole(objectives.Rows(6)), None, None, torch.zeros(1), torch.ones(1))
    result, heard = objectives.train(module, Training(epochs=2, batch_size=4), tmp_path, with_data=given)
    turns = [[f"at_step {n}", f"unsupervised {n} of 4", f"after_backward {n}", f"after_step {n}"] for n in range(4)]
    assert Other.calls == [call for turn in turns for call in turn]
    assert result.metrics.keys() >= {
        "train/supervised", "train/accuracy", "train/unsupervised", "train/spread", "validation/accuracy"
    }  # fmt: skip
    assert result.metrics["train/loss"] is not None
    assert all(value is not None for _, _, value in heard.metrics())
    scales = {
        name: group["lr_scale"] for group in module.parameter_groups(Training()) for name in group.get("names", ())
    }
    assert scales == {"unsupervised.scale": 3.0}


def test_every_weight_has_one_name() -> None:
    module = alternating()
    state = module.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert module.unsupervised.backbone is module.backbone


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"objective": "deepcluster"},
            r"params\.objective: deepcluster cannot .*numbers, and .*; use fixmatch, simclr",
        ),
        ({"objective": "gan"}, r"params\.objective: gan cannot .*play against"),
        ({"objective": "nonsense"}, r"params\.objective: there is no 'nonsense'; use fixmatch"),
        ({"objective": "image_classification"}, r"params\.objective: image_classification is no pretraining recipe"),
        ({"objective": "mae"}, r"params\.objective: this is a convolutional network: mae leaves out patches"),
        (
            {"objective": "simclr", "objective_params": {"temperature": -1}},
            r"params\.objective_params\.temperature: .*greater than 0",
        ),
        (
            {"objective": "vae", "objective_params": {"freeze_stages": 1}},
            r"params\.objective_params\.freeze_stages: the backbone is that of both kinds of steps",
        ),
        ({"objective_params": {"tau": 1}}, r"params\.objective_params\.tau: .*not permitted \(of fixmatch\)"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    params: dict[str, Any], message: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    with pytest.raises(UserFault, match=message):
        made(digits, tmp_path, job(**params))


def test_a_set_without_unlabelled_rows_is_refused(digits: DatasetFacts, tmp_path: Path) -> None:
    _, last = sets.carry_out(sets.order({**job(), "data": {}}, digits, tmp_path))
    assert isinstance(last, Failed)
    assert (last.error.fault, last.error.code) == ("data", "no_unlabelled_samples")
    assert "data.labels_per_class" in str(last.error.hint)


@pytest.mark.parametrize("name", semi_supervised.OBJECTIVES)
def test_every_objective_that_is_named_takes_turns(name: str, digits: DatasetFacts, tmp_path: Path) -> None:
    body = job(name, training={"epochs": 1, "steps": 4})
    body["model"] = sets.SMALL_VIT if name == "mae" else sets.NETWORK
    heard, last = sets.carry_out(sets.order(body, digits, tmp_path))
    assert isinstance(last, Finished), last
    assert {"train/supervised", "train/unsupervised"} <= {name for name, _, _ in heard.metrics()}
    assert last.model is not None
    assert (len(last.model.config.classes), last.metrics.keys() >= {"test/accuracy"}) == (10, True)


class Lying:
    """A source that says other labels."""

    slow = False

    def __init__(self, source: Any) -> None:
        self._source, self.labels = source, (source.labels + 5) % 10

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        return {**self._source.batch(rows, epoch), "label": self.labels[rows]}

    def numbers(self, rows: Tensor) -> Tensor:
        return self._source.numbers(rows)


@pytest.mark.parametrize("objective", ["fixmatch", "simclr"])
def test_labels_outside_the_budget_are_never_looked_at(objective: str, digits: DatasetFacts, tmp_path: Path) -> None:
    weights: list[dict[str, Tensor]] = []
    for lying in (False, True):
        run = made(digits, tmp_path / str(lying), job(objective))
        train = cast(Part, run.data.train)
        source: Any = Lying(train.source) if lying else train.source
        run = replace(run, data=replace(run.data, train=Part(source, train.rows, train.labels)))
        weights.append(trained(run, tmp_path / str(lying)))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_killed_run_of_two_kinds_of_steps_resumes_exactly(digits: DatasetFacts, tmp_path: Path) -> None:
    """In the middle of a cycle, with a teacher, an average and losses of both kinds."""
    body = job("byol", ratio=2, ema=0.9, training={"checkpoint_every": 1})
    whole = sets.order(body, digits, tmp_path / "whole")
    kept = tmp_path / "kept.safetensors"

    def keep(message: Message) -> None:
        if isinstance(message, Saved) and message.step == 5:
            kept.write_bytes((Path(whole.scratch) / message.file).read_bytes())

    _, last = sets.carry_out(whole, keep)
    resumed = sets.order(body, digits, tmp_path / "resumed", checkpoint=str(kept))
    _, again = sets.carry_out(resumed)
    assert isinstance(last, Finished)
    assert isinstance(again, Finished)
    assert sets.weights_sha256(resumed) == sets.weights_sha256(whole)
    assert again.metrics == last.metrics


def accuracies(body: dict[str, Any], facts: DatasetFacts, folder: Path) -> np.ndarray:
    found = []
    for seed in range(3):
        body["training"]["seed"] = seed
        _, last = sets.carry_out(sets.order(body, facts, folder / str(seed)))
        assert isinstance(last, Finished), last
        found.append(last.metrics["test/accuracy"])
    return np.array(found)


# Softer than the paper's, whose threshold few of these short runs would reach.
SOFT = {"threshold": 0.8, "magnitude": 4.0, "spread": 2.0, "cutout": 0.0}


@pytest.mark.parametrize(
    ("params", "steps", "labelled"),
    [
        # One sample in eight is labelled.
        pytest.param({"objective": "fixmatch", "objective_params": SOFT}, 300, {"steps": 300, "batch_size": 8}),
        # Every other step is supervised, with a batch of all labels.
        pytest.param({"objective": "simclr"}, 200, {"steps": 100, "batch_size": 60}),
    ],
    ids=["fixmatch", "simclr"],
)
def test_unlabelled_digits_help(params: dict[str, Any], steps: int, labelled: dict[str, int], tmp_path: Path) -> None:
    """Six labels a class, and as many supervised steps on as many labelled samples as the labels alone get.

    `pytest -s` prints mean and deviation of seeds 0 to 2.
    """
    facts = sets.write_set(tmp_path / "set", sets.digits(1000, 400))
    few = {"data": {"labels_per_class": 6, "validation_fraction": 0.0}, "model": {**sets.NETWORK, "width": 0.25}}
    training = {"learning_rate": 3e-3, "batch_size": 64, "steps": steps}
    together = accuracies({**job(**params, training=training), **few}, facts, tmp_path / "together")
    plain = sets.spec(params={"ema": 0.999}, training={**training, **labelled})
    alone = accuracies({**plain, **few}, facts, tmp_path / "alone")
    told = [f"{found.mean():.3f} ± {found.std(ddof=1):.3f}" for found in (together, alone)]
    print(f"{params['objective']}: {told[0]}, labels alone: {told[1]}")
    assert together.mean() > alone.mean() + 0.02
