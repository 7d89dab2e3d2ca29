"""Whatever a checkpoint holds must matter, and nothing may be missing: each part is damaged by itself on resume.

A part is a kind of tensor (`optimizer.exp_avg`, `model.running_mean`) or one entry of the JSON state (`run.waited`).
Left out or set back to what a fresh run has, it must lead to a refusal or to another outcome. Who adds a part to
`state.pack` has to name here the run in which it matters.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.domain.errors import SystemFault
from app.domain.spec import EarlyStopping, Optimizer, Training
from tests.worker import sets
from tests.worker.objectives import CPU, Rows, Small, data, keep_all, plan, whole
from worker import checkpoint, clock, loop
from worker.checkpoint import Checkpoints, Contents
from worker.data.source import Data
from worker.loop import Result
from worker.parts.tuning import Plan
from worker.recipe import Batch, Progress
from worker.report import Event
from worker.state import State
from worker.trainer import local, training

pytestmark = pytest.mark.worker


class Averaged(Small):
    """The small classifier, which is averaged as well."""

    ema_decay = 0.9


class Collapsed(Small):
    """Its features are all the same, which is reported once."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.backbone[3] = nn.Identity()
        self.backbone[4] = Same()


class Same(nn.Module):
    """Every sample becomes the first."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:1].expand_as(x)


class Slow(Small):
    """Every step takes a second of the clock in `NOW`."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        NOW[0] += 1.0
        return super().forward(batch, progress)


class NowAndThen(Small):
    """It tells how pure its clusters are in the first step of every other epoch, and they get worse."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        found = super().forward(batch, progress)
        new = progress.epoch % 2 == 0 and progress.step % 3 == 0
        return {**found, "purity": torch.tensor(1 / (2 + progress.epoch))} if new else found


NOW = [0.0]
STOPPING = EarlyStopping(metric="validation/loss", patience=3, min_delta=0.05)


@dataclass
class Run:
    """One way to train, in which some parts of a checkpoint matter."""

    training: Training
    build: Callable[[int], nn.Module] = Small
    planned: dict[str, Any] = field(default_factory=dict)
    first_plan: dict[str, Any] = field(default_factory=dict)  # what the plan said before memory ran out
    kind: str = "finetune"

    def plan(self) -> Plan:
        """Give the plan under which the run goes."""
        optimizer = Optimizer.model_validate(self.training.optimizer).model_dump()
        return plan(self.training, optimizer=optimizer, **self.planned)

    def data(self) -> Data:
        """Give twelve rows to train on and six to look at."""
        made = data(Rows(), validation=Rows(6))
        return made if self.kind == "finetune" else replace(made, probe=whole(Rows()))


TRAINING = Training(epochs=6, batch_size=4, checkpoint_every=1)
RUNS: dict[str, Run] = {
    "stops early, averaged": Run(
        TRAINING.model_copy(update={"early_stopping": STOPPING}), Averaged, {"learning_rate": 0.3, "log_every": 2}
    ),
    "stops early": Run(
        TRAINING.model_copy(update={"early_stopping": STOPPING, "optimizer": Optimizer(name="sgd")}),
        planned={"learning_rate": 0.3, "log_every": 2},
    ),
    "half precision": Run(TRAINING, planned={"precision": "float16", "learning_rate": 0.01}),
    "against the clock": Run(TRAINING.model_copy(update={"max_seconds": 11.0}), Slow),
    "collapsed": Run(TRAINING, Collapsed, {"probe_every": 1}, kind="pretrain"),
    "told now and then": Run(
        TRAINING.model_copy(update={"early_stopping": EarlyStopping(metric="train/purity", patience=2)}), NowAndThen,
        {"log_every": 1},
    ),
    "halved": Run(TRAINING, planned={"accumulate": 2}, first_plan={"accumulate": 1}),
}  # fmt: skip

# Every part that `state.pack` writes, and the run above in which it matters.
AVERAGED, PLAIN = "stops early, averaged", "stops early"
PARTS: dict[str, str] = {
    **{f"model.{name}": AVERAGED for name in
       ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "queue")},
    **{f"average.{name}": AVERAGED for name in ("weight", "bias", "running_mean", "running_var", "queue")},
    **{f"best.{name}": AVERAGED for name in
       ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "queue")},
    **{f"optimizer.{name}": AVERAGED for name in ("exp_avg", "exp_avg_sq", "step")},
    "optimizer.momentum_buffer": PLAIN,
    "window.values": AVERAGED,
    "window": AVERAGED,
    "average_updates": AVERAGED,
    "best_is_here": PLAIN,
    "plan": "halved",
    "scaler": "half precision",
    **{f"run.{name}": AVERAGED for name in ("step", "best", "waited", "metrics", "ended_by")},
    "run.told": "told now and then",
    "run.collapse_reported": "collapsed",
    "run.seconds": "against the clock",
}  # fmt: skip


@dataclass
class Ended:
    """Everything that a run leaves behind."""

    result: Result
    weights: dict[str, Tensor]
    heard: sets.Heard

    def outcome(self, *, after: int) -> tuple[Any, ...]:
        """Give what can be compared, of steps after that one."""
        result = self.result
        said = [
            (event.code, event.data["step"])
            for event in self.heard.of(Event)
            if event.data.get("step", 0) > after and event.code != "train.first_step"
        ]
        rows = [row for row in self.heard.metrics() if row[1] > after]
        return result.ended_by, result.step, result.metrics, result.best, said, rows

    def equals(self, other: "Ended", *, after: int) -> bool:
        """Say whether both came to the same."""
        if self.outcome(after=after) != other.outcome(after=after):
            return False
        return all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())


def carry_out(run: Run, folder: Path, *, newest: Path | None = None, seed: int = 0, keep: bool = False) -> Ended:
    """Train once, under the plan that a trainer would take."""
    heard = sets.Heard()
    if keep:
        keep_all(heard, folder)
    checkpoints = Checkpoints(folder, heard.reporter, newest=newest)
    order = local.local_order(sets.spec(), None, folder, folder, threads=1)
    first = run.plan().model_copy(update=run.first_plan).model_dump(mode="json")
    order = order.model_copy(update={"plan": first})
    planned = run.plan() if newest is None else training.plans_of(order, checkpoints)[1]
    module = run.build(seed)
    with running_clock(run.build is Slow):
        result = loop.train(
            module, run.data(), run.training, planned or run.plan(), CPU, heard.reporter, checkpoints, kind=run.kind
        )
    return Ended(result, {name: value.clone() for name, value in module.state_dict().items()}, heard)


@contextlib.contextmanager
def running_clock(fake: bool) -> Iterator[None]:
    """Let the time be what the steps say it is."""
    with pytest.MonkeyPatch.context() as patch:
        if fake:
            NOW[0] = 0.0
            patch.setattr(clock.time, "monotonic", lambda: NOW[0])
        yield


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ended, list[Path]]]:
    """Give every run without an interruption, and all its checkpoints."""
    found: dict[str, tuple[Ended, list[Path]]] = {}
    for name, run in RUNS.items():
        folder = tmp_path_factory.mktemp("runs") / "kept"
        ended = carry_out(run, folder, keep=True)
        found[name] = ended, sorted(folder.glob("kept-*.safetensors"), key=step_of)
    return found


def step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def parts(contents: Contents) -> set[str]:
    """Take a checkpoint apart by kinds of tensors and entries of the state."""
    found = {part_of(name) for name in contents.tensors} | {f"run.{name}" for name in contents.state["run"]}
    return found | (set(contents.state) - {"run"})


def part_of(tensor: str) -> str:
    return f"{tensor.partition('.')[0]}.{tensor.rpartition('.')[2]}"


def damaged(contents: Contents, part: str, how: str, run: Run) -> Contents | None:
    """Leave a part out, or set it back to what a fresh run has; None where that changes nothing."""
    tensors, state = dict(contents.tensors), {**contents.state, "run": dict(contents.state["run"])}
    for name in [name for name in tensors if part_of(name) == part]:
        if how == "left out":
            del tensors[name]
        else:
            tensors[name] = torch.zeros_like(tensors[name])
    fresh: dict[str, Any] = {
        "window": [], "average_updates": 0, "best_is_here": False,
        "plan": run.plan().model_copy(update=run.first_plan).model_dump(mode="json"),
        "scaler": torch.amp.GradScaler("cpu", enabled=run.plan().precision == "float16").state_dict(),
    }  # fmt: skip
    place, name, usual = (
        (state["run"], part[4:], vars(State())) if part.startswith("run.") else (state, part, fresh)
    )  # fmt: skip
    if name in place:
        if how == "left out":
            del place[name]
        else:
            place[name] = usual[name]
    unchanged = state == contents.state and all(
        name in tensors and torch.equal(value, tensors[name]) for name, value in contents.tensors.items()
    )
    return None if unchanged else Contents(tensors, state)


def test_every_part_that_is_written_is_known(whole_runs: dict[str, tuple[Ended, list[Path]]]) -> None:
    for name, (_, paths) in whole_runs.items():
        assert paths, name
    written = {
        part for _, paths in whole_runs.values() for path in paths for part in parts(checkpoint.read(path))
    }  # fmt: skip
    assert written == set(PARTS), "name here the run in which a new part matters"


@pytest.mark.parametrize("name", RUNS)
def test_an_undamaged_checkpoint_loses_nothing(
    name: str, whole_runs: dict[str, tuple[Ended, list[Path]]], tmp_path: Path
) -> None:
    ended, paths = whole_runs[name]
    for path in paths:
        again = carry_out(RUNS[name], tmp_path / path.stem, newest=path, seed=99)
        assert ended.equals(again, after=step_of(path)), path


@pytest.mark.parametrize("how", ["left out", "set back"])
@pytest.mark.parametrize("part", PARTS)
def test_damage_to_any_part_is_noticed(
    part: str, how: str, whole_runs: dict[str, tuple[Ended, list[Path]]], tmp_path: Path
) -> None:
    run = RUNS[PARTS[part]]
    ended, paths = whole_runs[PARTS[part]]
    tried = 0
    for path in paths:
        contents = damaged(checkpoint.read(path), part, how, run)
        if contents is None:
            continue  # this checkpoint has no such part, or it is what a fresh run has anyway
        tried += 1
        crippled = tmp_path / f"{path.stem}.safetensors"
        checkpoint.write(crippled, contents)
        try:
            again = carry_out(run, tmp_path / path.stem, newest=crippled, seed=99)
        except (SystemFault, KeyError, RuntimeError):
            return
        if not ended.equals(again, after=step_of(path)):
            return
    pytest.fail(f"{tried} damaged checkpoints led to the same end" if tried else "no checkpoint has this part")
