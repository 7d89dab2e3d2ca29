"""Several processes as one: on the CPU, over gloo, two or three of them compute what one would."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from tests.worker import partner, sets
from tests.worker.partner import MLP, SGD, Turn
from worker.checkpoint import Checkpoints
from worker.loop import Result
from worker.parts import distributed
from worker.parts.tuning import Plan
from worker.report import Message, Saved
from worker.trainer import assembly

pytestmark = pytest.mark.worker


class Partners:
    """Processes that wait for something to train, started when first needed."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def tell(self, turns: list[Turn]) -> None:
        """Give each its turn."""
        while len(self._processes) < len(turns):
            command = [sys.executable, "-m", "tests.worker.partner"]
            made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._processes.append(made)
        for process, turn in zip(self._processes, turns, strict=False):
            assert process.stdin is not None
            process.stdin.write(turn.model_dump_json() + "\n")
            process.stdin.flush()

    def answers(self, count: int) -> list[dict[str, Any]]:
        """Read what they made of it."""
        return [json.loads(process.stdout.readline()) for process in self._processes[:count] if process.stdout]

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def partners() -> Iterator[Partners]:
    made, before = Partners(), distributed.PATIENCE
    distributed.PATIENCE = partner.PATIENCE
    yield made
    distributed.PATIENCE = before
    made.close()


@dataclass
class Ran:
    """What came of a run, in the first process and the others."""

    heard: sets.Heard
    module: nn.Module
    plan: Plan
    result: Result
    others: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, prefix: str = "") -> dict[tuple[str, int], float | None]:
        """Give all metrics by name and step."""
        return {(name, step): value for name, step, value in self.heard.metrics() if name.startswith(prefix)}


def train(
    partners: Partners, body: dict[str, Any], facts: DatasetFacts, folder: Path, world: int, *, hooked: bool = False,
    wish: Callable[[Message], str | None] = lambda _: None, plan: Plan | None = None, **given: Any,
) -> Ran:  # fmt: skip
    heard = sets.Heard(wish)
    order = sets.order(body, facts, folder, processes=world, **given)
    turns = [
        Turn(order=order, plan=plan, rank=rank, world=world, store=str(folder / "store"), hooked=hooked)
        for rank in range(world)
    ]
    # The first one decodes and caches; the others find it done.
    assembly.assemble(order, sets.Heard().reporter)
    partners.tell(turns[1:])
    newest = Path(order.checkpoint) if order.checkpoint else None
    checkpoints = Checkpoints(Path(order.scratch), heard.reporter, newest=newest)
    try:
        module, plan, result = partner.run(turns[0], heard, checkpoints)
    finally:
        others = partners.answers(world - 1)
    return Ran(heard, module, plan, result, others)


def assert_same_run(one: Ran, several: Ran) -> None:
    expected, found = one.curve(), several.curve()
    assert found.keys() == expected.keys()
    assert len({step for name, step in expected if name == "train/loss"}) >= 20
    for key, value in expected.items():
        # One sample of hundreds may fall on the other side of a boundary.
        slack = 1e-4 if key[0].endswith(("loss", "learning_rate")) else 2e-2
        assert found[key] == pytest.approx(value, abs=slack, rel=1e-4), key
    theirs = several.module.state_dict()
    for name, value in one.module.state_dict().items():
        assert torch.allclose(theirs[name].double(), value.double(), atol=1e-4, rtol=1e-3), name
    assert several.others
    for other in several.others:
        assert other["digest"] == partner.digest(several.module), "all processes hold the same bits"
        assert (other["step"], other["ended_by"]) == (several.result.step, several.result.ended_by)


CASES: dict[str, dict[str, Any]] = {
    "augmented": {"params": {"augmentation": "standard"}},
    "accumulated, averaged, clipped": {
        "params": {"augmentation": "light", "ema": 0.9}, "training": {"accumulate": 2, "gradient_clip": 0.5},
    },
    "mixed": {"params": {"mixup": 0.4, "cutmix": 1.0}, "training": {"accumulate": 2}},
    "batch norm": {"model": sets.NETWORK, "training": {"epochs": 4, "batch_size": 64, "learning_rate": 0.01}},
    "thawing": {"model": {"architecture": "mlp", "hidden": [32, 32]}, "params": {"trainable": "gradual"}},
    "frozen": {"model": {"architecture": "mlp", "hidden": [32, 32]}, "params": {"trainable": "last:1"}},
    "resampled, ended early": {
        "params": {"class_balance": "resample"},
        "training": {"epochs": 9, "early_stopping": {"metric": "validation/loss", "patience": 1, "min_delta": 0.3}},
    },
}  # fmt: skip


def classification(case: dict[str, Any]) -> dict[str, Any]:
    training = {"epochs": 3, "batch_size": 32, "learning_rate": 0.05, **SGD, **case.get("training", {})}
    return {
        **sets.spec(params=case.get("params", {})), "model": case.get("model", MLP), "training": training,
        "data": {"validation_fraction": 0.4},
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_processes_fine_tune_as_one(
    case: dict[str, Any], partners: Partners, many: DatasetFacts, tmp_path: Path
) -> None:
    body = classification(case)
    one, two = (train(partners, body, many, tmp_path / str(world), world) for world in (1, 2))
    assert (one.plan.world_size, two.plan.world_size) == (1, 2)
    assert_same_run(one, two)
    assert {type(module) for module in two.module.modules()} == {type(module) for module in one.module.modules()}


@pytest.mark.parametrize("recipe", ["simclr", "vicreg", "barlow_twins"])
def test_two_processes_compare_views_as_one(
    recipe: str, partners: Partners, many: DatasetFacts, tmp_path: Path
) -> None:
    """Whatever ties the samples of a batch together sees all of them, and its gradient has the right size."""
    rates = {"simclr": 0.1, "vicreg": 0.005, "barlow_twins": 0.05}
    training = {"epochs": 5, "batch_size": 128, "learning_rate": rates[recipe], "gradient_clip": 10.0, **SGD}
    body = {**sets.spec(recipe), "model": MLP, "training": training}
    one, two = (train(partners, body, many, tmp_path / str(world), world) for world in (1, 2))
    assert ("probe/effective_rank", 25) in one.curve(), "features that both computed in turn"
    assert_same_run(one, two)


def test_two_processes_see_sixteen_bits_as_one(partners: Partners, tmp_path: Path) -> None:
    wide = {split: (pixels.astype(np.uint16) * 257, labels) for split, (pixels, labels) in sets.digits(700, 60).items()}
    facts, body = sets.write_set(tmp_path / "set", wide), classification({"params": {"augmentation": "light"}})
    one, two = (train(partners, body, facts, tmp_path / str(world), world) for world in (1, 2))
    assert_same_run(one, two)


def test_two_processes_compute_activations_twice_without_counting_a_batch_twice(
    partners: Partners, many: DatasetFacts, tmp_path: Path
) -> None:
    training = {"epochs": 5, "batch_size": 128, "learning_rate": 0.05, "gradient_clip": 10.0, **SGD}
    body = {**sets.spec("simclr"), "model": sets.NETWORK, "training": training}
    plain = train(partners, body, many, tmp_path / "plain", 2)
    less = plain.plan.model_copy(update={"checkpoint_activations": True})
    assert_same_run(plain, train(partners, body, many, tmp_path / "twice", 2, plan=less))


def test_norms_whose_gradient_is_penalised_are_ours_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own has no second derivative."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for opposed, wanted in ((False, nn.SyncBatchNorm), (True, distributed._SynchronisedBatchNorm)):
        if opposed:
            cast(Any, network).opponents = {"one": ("0",), "other": ("1",)}
        distributed.synchronise_norms(network, "cuda")
        assert type(network[1]) is wanted
        distributed.separate_norms(network)
        assert type(network[1]) is nn.BatchNorm2d


def test_two_processes_take_turns_between_objectives_as_one(
    partners: Partners, many: DatasetFacts, tmp_path: Path
) -> None:
    """Each step is of one kind everywhere, and what waits in it gets no gradient anywhere."""
    training = {"epochs": 3, "batch_size": 64, "learning_rate": 0.05, "gradient_clip": 10.0, **SGD}
    body = {**sets.spec("semi_supervised", params={"objective": "simclr"}), "model": MLP, "training": training}
    one, two = (train(partners, body, many, tmp_path / str(world), world) for world in (1, 2))
    assert {"train/supervised", "train/unsupervised"} <= {name for name, _ in one.curve()}
    assert_same_run(one, two)


def test_hooks_leave_the_same_state_everywhere(partners: Partners, many: DatasetFacts, tmp_path: Path) -> None:
    ran = train(partners, classification({"training": {"batch_size": 48}}), many, tmp_path, 3, hooked=True)
    assert [other["digest"] for other in ran.others] == [partner.digest(ran.module)] * 2


def test_a_resumed_run_of_three_ends_with_the_same_bits(partners: Partners, many: DatasetFacts, tmp_path: Path) -> None:
    """With three the order of summing matters, so gradients must be laid out alike in every attempt."""
    training = {"epochs": 2, "batch_size": 48, "checkpoint_every": 7}
    body = {**sets.spec(params={"augmentation": "light"}), "training": training, "model": sets.NETWORK}
    kept = tmp_path / "kept.safetensors"

    def keep(message: Message) -> None:
        if isinstance(message, Saved) and message.step == 7:
            kept.write_bytes((tmp_path / "whole" / "scratch" / message.file).read_bytes())

    whole = train(partners, body, many, tmp_path / "whole", 3, wish=keep)
    resumed = train(partners, body, many, tmp_path / "resumed", 3, checkpoint=str(kept))
    assert partner.digest(resumed.module) == partner.digest(whole.module)
    assert resumed.curve().items() <= whole.curve().items()
    assert {other["digest"] for other in resumed.others} == {partner.digest(whole.module)}


def test_a_stop_ends_all_at_the_same_step(partners: Partners, many: DatasetFacts, tmp_path: Path) -> None:
    body = classification({"training": {"epochs": 2000}})

    def stop(message: Message) -> str | None:
        return "stop" if getattr(message, "code", "") == "train.first_step" else None

    ran = train(partners, body, many, tmp_path, 2, wish=stop)
    assert ran.result.outcome == "stopped"
    assert 1 <= ran.result.step < 0.9 * ran.plan.steps
    assert [other["step"] for other in ran.others] == [ran.result.step]
    assert [saved.step for saved in ran.heard.of(Saved)][-1] == ran.result.step


def test_time_that_is_over_ends_all_at_the_same_step(partners: Partners, many: DatasetFacts, tmp_path: Path) -> None:
    ran = train(partners, classification({"training": {"epochs": 5000, "max_seconds": 1.0}}), many, tmp_path, 2)
    assert ran.result.ended_by == "max_seconds"
    assert [(other["step"], other["ended_by"]) for other in ran.others] == [(ran.result.step, "max_seconds")]


def test_a_loss_that_is_not_finite_ends_all(partners: Partners, many: DatasetFacts, tmp_path: Path) -> None:
    body = classification({"training": {"learning_rate": 1e30, "warmup_fraction": 0}})
    with pytest.raises(UserFault, match=r"not finite at step (\d+)") as raised:
        train(partners, body, many, tmp_path, 2)
    assert len(raised.value.message.split(",")) > 30, "the samples of the whole batch"
    after = train(partners, classification({"training": {"epochs": 1}}), many, tmp_path / "after", 2)
    assert [other["digest"] for other in after.others] == [partner.digest(after.module)], "both are free again"
