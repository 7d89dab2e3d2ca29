"""What the bench measures with: clocks of both sides, the same network on both, and where the time of a run goes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.benchmarks import __main__ as bench_main
from tests.benchmarks import naive, ours, pictures, shares, sides
from tests.benchmarks.naive import small_vgg
from tests.benchmarks.stopwatch import INSIDE, OUTSIDE, REST, Stopwatch
from tests.worker import sets
from worker import checkpoint
from worker.checkpoint import Checkpoints
from worker.parts.small_networks import small_cnn
from worker.pretrain.deepcluster import DeepCluster
from worker.report import Finished, Order

pytestmark = pytest.mark.worker
BACKWARD = torch.Tensor.backward


def test_a_rate_waits_for_the_gpu_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: told.append("wait"))

    def step(number: int) -> int:
        told.append(f"step {number}")
        return 1

    pictures._rate(step, 0.0)
    assert told == ["step 0", "step 1", "step 2", "wait", "step 3", "wait"]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the clock of the usual way, which jumps by 1,000 s wherever it looks at the test pictures."""
    now = [0.0]

    def look(*_: Any) -> float:
        now[0] += 1000.0
        return 0.5

    monkeypatch.setattr(naive, "evaluate", look)
    monkeypatch.setattr(naive.time, "perf_counter", lambda: now[0] + time.monotonic())
    return now


@pytest.mark.parametrize(("more", "looks"), [({}, False), ({"target": 0.9}, True), ({"target": 0.4}, True)])
def test_the_test_pictures_take_the_other_side_time_only_in_a_race_to_an_accuracy(
    more: dict[str, float], looks: bool, late: list[float], tmp_path: Path
) -> None:
    bench_main.random_pictures(tmp_path, per_class=4, classes=2, size=32)
    found = naive.classification(
        {"folder": str(tmp_path), "architecture": "resnet18", "image_size": 32, "batch_size": 4, "epochs": 1,
         "warmup": 1, "evaluate": True, **more}
    )  # fmt: skip
    assert late[0] > 0, "it looked"
    assert found["accuracy"] == 0.5
    assert (found["seconds"] > 500) is looks


def test_the_rate_of_the_other_side_ends_with_its_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr(naive.time, "perf_counter", lambda: next(times))
    watch = naive.Clock(warmup=1, seconds=4.0)
    assert [watch.over(8) for _ in range(3)] == [False, False, True]
    assert watch.rate == 16 / 4


def test_our_rate_and_seconds_are_those_of_training() -> None:
    """From the first report after the warm-up to the last step; neither ingest, the test nor the export."""
    plan = {"steps_per_epoch": 4, "batch_size": 10}
    steps = [
        line
        for step in (2, 4, 6, 8)
        for line in (
            {"type": "metrics", "at": 20.0 + step, "rows": [["train/loss", step, 1.0 / step]]},
            {"type": "progress", "phase": "train", "at": 20.5 + step, "step": step},
        )
    ]
    found = sides._summary(
        [
            {"type": "begun", "at": 10.0, "before_ingest": 4.0}, {"type": "planned", "at": 12.0, "plan": plan}, *steps,
            {"type": "progress", "phase": "train", "at": 30.0, "step": 8},
            {"type": "finished", "at": 50.0, "metrics": {"test/accuracy": 0.75}},
        ], warmup=3,
    )  # fmt: skip
    assert found["samples_per_second"] == pytest.approx(4 * 10 / 4.5), "from step 4 at 24.0 to step 8 at 28.5"
    assert (found["seconds_to_trained"], found["seconds_from_plan"], found["seconds"]) == (20.0, 38.0, 40.0)
    assert found["seconds_with_ingest"] == 46.0
    assert (found["accuracy"], found["last_epoch_loss"]) == (0.75, pytest.approx((1 / 6 + 1 / 8) / 2))
    assert [(end["seconds"], end["seconds_with_ingest"]) for end in found["epoch_ends"]] == [(14.0, 20.0), (18.0, 24.0)]


@pytest.mark.parametrize(("channels", "size", "width"), [(3, 32, 1.0), (3, 32, 0.5), (1, 8, 1.0), (1, 28, 0.25)])
def test_small_vgg_is_small_cnn_layer_for_layer(channels: int, size: int, width: float) -> None:
    ours, other = small_cnn(channels=channels, image_size=size, width=width), small_vgg(channels, size, width)
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.GELU)
    layers = [[layer for layer in network.modules() if isinstance(layer, kinds)] for network in (ours, other)]
    assert [str(layer) for layer in layers[0]] == [str(layer) for layer in layers[1]]
    for mine, theirs in zip(ours.state_dict().values(), other.state_dict().values(), strict=True):
        theirs.copy_(mine)
    images = torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(images), other(images))
    mine, theirs = (network.eval()(images) for network in (ours, other))
    assert torch.equal(mine, theirs)


def test_a_section_keeps_what_happens_in_it_but_augmentation_in_a_forward_pass() -> None:
    now = 0.0
    watch = Stopwatch(lambda: now)
    with watch.section("health"):
        now += 1
        with watch.section("augmentation"), watch.section("forward"):
            now += 2
    now += 4
    with watch.section("forward"):
        now += 8
        with watch.section("augmentation"):
            now += 16
        with watch.section("reporting"):
            now += 32
        now += 64
    spent = {name: seconds for name, seconds in watch.read().items() if seconds}
    assert spent == {"health": 3, REST: 4, "forward": 104, "augmentation": 16}


def test_a_run_is_watched_and_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps in a clustering and in a checkpoint are found where they are; the weights are those of any run."""
    monkeypatch.setattr(checkpoint, "KEEP", 9)
    facts = sets.write_set(tmp_path / "set", sets.digits())
    before_epoch, save, naps = DeepCluster.before_epoch, Checkpoints.save, {"pseudo-labels": 0, "checkpoints": 0}

    def slow(section: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **given: Any) -> Any:
            naps[section] += 1
            time.sleep(0.2)
            return call(*args, **given)

        return called

    def run_of(name: str) -> Order:
        body = sets.spec("deepcluster", params={"reassign_every": 1}, training={"epochs": 4, "checkpoint_every": 10})
        return sets.order(body, facts, tmp_path / name)

    plain = run_of("plain")
    _, last = sets.carry_out(plain)
    assert isinstance(last, Finished), last
    with monkeypatch.context() as patched:
        patched.setattr(DeepCluster, "before_epoch", slow("pseudo-labels", before_epoch))
        patched.setattr(Checkpoints, "save", slow("checkpoints", save))
        watched = run_of("watched")
        monkeypatch.setattr(ours, "order_of", lambda asked: watched)
        found = shares.measure({"epochs": 2})
    counted = found["shares"]
    assert sum(counted[name] for name in (*INSIDE, *OUTSIDE, REST)) == pytest.approx(1)
    seconds = {name: share * found["seconds"] for name, share in counted.items()}
    # Steps 3 to 23 of ten an epoch: two epochs begin, and steps 10 and 20 leave checkpoints.
    assert 0.4 <= seconds["pseudo-labels"] < 0.4 + found["seconds"] / 2
    assert 0.4 <= seconds["checkpoints"] < 0.4 + found["seconds"] / 2
    assert all(counted[name] > 0 for name in (*INSIDE, "reading", "augmentation", "reporting", REST))
    assert found["outside"] == pytest.approx(sum(seconds[name] for name in (*OUTSIDE, REST)))
    assert naps == {"pseudo-labels": 3, "checkpoints": 3}, "the last of each comes when nothing is counted any more"
    assert DeepCluster.before_epoch is before_epoch
    assert Checkpoints.save is save
    assert torch.Tensor.backward is BACKWARD
    kept = [Path(each.scratch) / "checkpoint-000000020.safetensors" for each in (plain, watched)]
    assert kept[0].read_bytes() == kept[1].read_bytes()
