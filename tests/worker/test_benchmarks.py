"""The bench measures what it says: the same network on both sides, ratios in the direction of their goals."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.benchmarks import __main__ as bench_main
from tests.benchmarks import table
from tests.benchmarks.naive import small_vgg
from tests.benchmarks.pairs import Bench, Compare, Pair, Workload
from worker.parts.small_networks import small_cnn

pytestmark = pytest.mark.worker


def one(compare: Compare, goal: float, found: list[Pair]) -> Workload:
    def run(bench: Bench) -> Iterator[Pair]:
        yield from found

    return Workload("one", "s", goal, compare, run)


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
