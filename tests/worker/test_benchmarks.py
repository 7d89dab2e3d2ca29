"""The bench measures what it says: the same network on both sides, ratios in the direction of their goals."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.benchmarks import __main__ as bench_main
from tests.benchmarks import naive, ours, pictures, shares, sides, table
from tests.benchmarks.naive import small_vgg
from tests.benchmarks.pairs import Bench, Compare, Pair, Quality, Workload, picture_folder
from tests.benchmarks.stopwatch import INSIDE, OUTSIDE, REST, Stopwatch
from tests.benchmarks.workloads import WORKLOADS
from tests.worker import sets
from worker import catalogue, checkpoint
from worker.checkpoint import Checkpoints
from worker.parts.small_networks import small_cnn
from worker.pretrain.deepcluster import DeepCluster
from worker.report import Finished, Order

pytestmark = pytest.mark.worker
BACKWARD = torch.Tensor.backward


def one(compare: Compare, goal: float, found: list[Pair]) -> Workload:
    def run(bench: Bench) -> Iterator[Pair]:
        yield from found

    return Workload("one", "s", goal, compare, run)


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


@pytest.mark.parametrize(
    ("compare", "goal", "pairs", "median", "met"),
    [
        ("rate", 2.0, [Pair(300, 100), Pair(100, 100), Pair(250, 100)], 2.5, True),
        ("rate", 3.0, [Pair(250, 100)], 2.5, False),
        ("time", 2.0, [Pair(1, 4)], 4.0, True),
        ("time", 5.0, [Pair(1, 4)], 4.0, False),
        ("cost", 1.3, [Pair(1.2, 1)], 1.2, True),
        ("cost", 1.1, [Pair(1.2, 1)], 1.2, False),
        ("quality", 0.5, [Pair(0.796, 0.8), Pair(0.799, 0.8)], 0.996875, True),
        ("quality", 0.5, [Pair(0.79, 0.8), Pair(0.79, 0.8)], 0.9875, False),
    ],
)
def test_each_kind_of_ratio_points_at_its_goal(
    compare: Compare, goal: float, pairs: list[Pair], median: float, met: bool
) -> None:
    row = table.line(one(compare, goal, pairs), pairs, 1.0)
    assert row["ratio"]["median"] == pytest.approx(median)
    assert row["met"] is met
    assert {"name", "ours", "other", "unit", "ratio", "quality", "pairs", "command"} <= set(row)


def test_further_limits_hold_too_and_a_bound_is_said() -> None:
    pairs = [Pair(1, 20, bound=True, summary={"p95": 0.7})]
    workload = Workload("one", "s", 10, "time", lambda bench: iter(pairs), limits=(("p95", 0.6),))
    row = table.line(workload, pairs, 1.0)
    assert row["met"] is False
    assert row["bound"] is True
    printed = table.table([row], [], []).columns[4]
    assert list(printed.cells) == ["[red]>= 20[/]"]


@pytest.mark.parametrize(
    ("quality", "pairs", "met"),
    [
        ("accuracy", [(0.796, 0.8)], True),
        ("accuracy", [(0.79, 0.8)], False),
        ("accuracy", [(0.79, 0.8), (0.81, 0.8), (0.78, 0.8)], True),  # the seeds explain it
        ("loss", [(100.9, 100.0)], True),
        ("loss", [(102.0, 100.0)], False),
        ("loss", [(50.0, 100.0)], True),
    ],
)
def test_speed_alone_meets_no_goal(quality: Quality, pairs: list[tuple[float, float]], met: bool) -> None:
    found = [Pair(300, 100, quality=each) for each in pairs]
    workload = Workload("one", "s", 2, "rate", lambda bench: iter(found), quality=quality)
    row = table.line(workload, found, 1.0, options="PAIRS=1 DATA=pictures")
    assert row["met"] is met
    assert row["command"] == "make bench ONLY=one PAIRS=1 DATA=pictures"


def fast_and_good(speed: float, mine: float) -> list[Workload]:
    good = [Pair(mine, 0.8, (mine, 0.8)), Pair(mine, 0.8, (mine, 0.8))]
    return [
        Workload("good", "accuracy", 0.5, "quality", lambda bench: iter(good)),
        Workload("fast", "s", 2, "rate", lambda bench: iter([Pair(speed, 100)]), as_good_as="good"),
        one("rate", 1, [Pair(2, 1)]),
    ]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("speed", "mine", "met"), [(300, 0.8, True), (300, 0.7, False), (100, 0.8, False)])
def test_what_is_only_timed_meets_its_goal_with_the_line_that_compares_its_quality(
    speed: float, mine: float, met: bool, backwards: bool, tmp_path: Path
) -> None:
    wanted = fast_and_good(speed, mine)[:: -1 if backwards else 1]
    rows, _ = bench_main.measure(wanted, Bench(tmp_path, tmp_path), tmp_path / "bench.json")
    assert [row["name"] for row in rows] == [each.name for each in wanted]
    row = next(row for row in rows if row["name"] == "fast")
    assert (row["met"], row["speed_met"]) == (met, speed == 300)
    assert row["quality"] == {"ours": pytest.approx(mine), "other": pytest.approx(0.8)}
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
    shown = list(table.table(rows, [], []).columns[-1].cells)
    assert shown[rows.index(row)] == shown[[each.name for each in wanted].index("good")] == f"{mine:.4g} ± 0 / 0.8 ± 0"


@pytest.mark.parametrize(
    ("speed", "met", "says", "colour"),
    [(300, None, "speed met; quality not", "yellow"), (100, False, "too slow; quality not", "red")],
)
def test_without_the_line_that_compares_its_quality_speed_alone_is_said(
    speed: float, met: bool | None, says: str, colour: str, tmp_path: Path
) -> None:
    _, fast, other = fast_and_good(speed, 0.8)
    rows, _ = bench_main.measure([fast, other], Bench(tmp_path, tmp_path), tmp_path / "bench.json")
    assert [row["met"] for row in rows] == [met, True]
    printed = table.table(rows, [], [])
    assert next(iter(printed.columns[-1].cells)) == f"{says} compared in this run"
    assert str(next(iter(printed.columns[4].cells))).startswith(f"[{colour}]")


def test_every_training_that_is_only_timed_names_what_compares_its_quality() -> None:
    known = {each.name: each for each in WORKLOADS}
    timed = [each for each in WORKLOADS if each.name.startswith(("finetune_", "simclr_"))]
    assert len(timed) == 5
    for each in timed:
        assert each.as_good_as is not None, each.name
        assert known[each.as_good_as].compare == "quality", each.name
        assert WORKLOADS.index(known[each.as_good_as]) < WORKLOADS.index(each), each.name


def test_accuracies_of_random_pictures_are_refused() -> None:
    assert not [each for each in bench_main.chosen(None, pictures=False) if each.compare == "quality"]
    with pytest.raises(SystemExit, match="quality_simclr_small_cnn_32, cifar_85: accuracies need real pictures"):
        bench_main.chosen("quality_simclr_small_cnn_32,vae_mlp_128,cifar_85", pictures=False)


def test_accuracies_of_random_pictures_are_not_kept(tmp_path: Path) -> None:
    wanted = [one("rate", 2, [Pair(300, 100, quality=(0.1, 0.9))])]
    for real in (True, False):
        rows, _ = bench_main.measure(wanted, Bench(tmp_path, tmp_path), tmp_path / "bench.json", pictures=real)
        assert (rows[0]["met"], rows[0]["quality"] is not None) == (False if real else None, real)
    shown = next(iter(table.table(rows, [], []).columns[-1].cells))
    assert shown == "speed met; quality not compared in this run"


def test_one_failure_leaves_the_others_running(tmp_path: Path) -> None:
    def broken(bench: Bench) -> Iterator[Pair]:
        raise RuntimeError("no such thing")

    wanted = [Workload("broken", "s", 1, "rate", broken), one("rate", 1, [Pair(2, 1)])]
    rows, failed = bench_main.measure(wanted, Bench(tmp_path, tmp_path), tmp_path / "bench.json")
    assert [row["name"] for row in rows] == ["one"]
    assert failed == [("broken", "RuntimeError: no such thing")]
    assert (tmp_path / "bench.json").exists()


def test_names_are_checked_and_the_slow_one_is_left_out() -> None:
    assert "cifar_85" not in [each.name for each in bench_main.chosen(None)]
    assert [each.name for each in bench_main.chosen("cifar_85,vae_mlp_128")] == ["cifar_85", "vae_mlp_128"]
    with pytest.raises(SystemExit, match=r"no workload nonsense; there are: .*vae_mlp_128"):
        bench_main.chosen("nonsense")


def test_a_part_has_as_many_pictures_of_every_class(tmp_path: Path) -> None:
    bench_main.random_pictures(tmp_path / "all", per_class=10, classes=3, size=8)
    bench = Bench(tmp_path / "all", tmp_path / "work")
    part = bench.part(9, 3, evaluated_as="validation")
    counts = {str(each.relative_to(part)): len(list(each.iterdir())) for each in part.glob("*/*")}
    assert counts == {
        f"{split}/class{label}": n for split, n in (("train", 3), ("validation", 1)) for label in range(3)
    }
    assert bench.part(9, 3, evaluated_as="validation") == part
    assert bench.samples() == 30
    with pytest.raises(ValueError, match=r"train/class0 has 10 pictures, and this line needs 11 of each class"):
        bench.part(33)


def test_a_folder_without_pictures_is_named_at_once(tmp_path: Path) -> None:
    bench_main.random_pictures(tmp_path / "all", per_class=5, classes=2, size=8)
    assert picture_folder(str(tmp_path / "all")) == tmp_path / "all"
    with pytest.raises(argparse.ArgumentTypeError, match="none/train is no folder with a folder of pictures"):
        picture_folder(str(tmp_path / "none"))
    (tmp_path / "all" / "test" / "more").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match="differ in their classes: more"):
        picture_folder(str(tmp_path / "all"))


def test_the_beginning_of_names_stands_for_all_of_them() -> None:
    found = [each.name for each in bench_main.chosen("outside_steps,outside_steps_simclr,vae_mlp_128")]
    recipes = [each.name for each in catalogue.recipes().values() if each.kind == "pretrain"]
    assert sorted(found) == sorted(
        ["vae_mlp_128", *(f"outside_steps_{name}" for name in (*recipes, "semi_supervised"))]
    )
    with pytest.raises(SystemExit, match="no workload outsid;"):
        bench_main.chosen("outsid")


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
