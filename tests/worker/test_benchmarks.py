"""What the bench says: ratios in the direction of their goals, qualities beside speeds, and what it refuses."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as bench_main
from tests.benchmarks import table
from tests.benchmarks.pairs import Bench, Compare, Pair, Quality, Workload, picture_folder
from tests.benchmarks.workloads import WORKLOADS
from worker import catalogue

pytestmark = pytest.mark.worker


def one(compare: Compare, goal: float, found: list[Pair]) -> Workload:
    def run(bench: Bench) -> Iterator[Pair]:
        yield from found

    return Workload("one", "s", goal, compare, run)


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
