"""`make methods`: the table's arithmetic, a budget that is kept, cells that are not run twice, the probes."""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app.domain.datasets import DatasetFacts
from app.domain.spec import Data
from tests.benchmarks import __main__ as bench_main
from tests.benchmarks.methods import __main__ as command
from tests.benchmarks.methods import budget, probes, table
from tests.benchmarks.methods.cells import REFERENCES, Cell, Results, Set, alone, network_of
from tests.benchmarks.pairs import Numbers
from tests.worker import sets
from worker.data.split import split_labels
from worker.ingest import builtin
from worker.report import Reporter
from worker.trainer.assembly import assemble

pytestmark = pytest.mark.worker

DIGITS = Set("digits", "builtin:digits", patch=2, labels_per_class=10)


def rows(method: str, architecture: str | None, knn: list[float], linear: list[float]) -> list[Numbers]:
    return [
        {**vars(Cell("digits", method, seed, 5.0)), "architecture": architecture, "knn": k, "linear": x,
         "effective_rank": 3.0, "steps": 10 + seed, "seconds": 5.0, "samples_per_second": 1000.0}
        for seed, (k, x) in enumerate(zip(knn, linear, strict=True))
    ]  # fmt: skip


CELLS = [
    *rows("untrained small_cnn", "small_cnn", [0.20, 0.22, 0.24], [0.70, 0.72, 0.74]),
    *rows("untrained small_cnn, norms settled", "small_cnn", [0.60, 0.62, 0.64], [0.50, 0.52, 0.54]),
    *rows("untrained small_vit", "small_vit", [0.30, 0.30, 0.30], [0.40, 0.40, 0.40]),
    *rows("simclr", "small_cnn", [0.90, 0.91, 0.95], [0.71, 0.72, 0.70]),
    *rows("gan", "small_cnn", [0.61, 0.66, 0.63], [0.70, 0.76, 0.74]),
    *rows("mae", "small_vit", [0.31, 0.32, 0.33], [0.40, 0.40, 0.40]),
]


def test_each_method_is_held_against_the_better_untrained_backbone_of_its_kind() -> None:
    made = {line["method"]: line for line in table.lines(CELLS, REFERENCES)}
    assert list(made) == [name for name in REFERENCES if name != "pixels"] + ["gan", "mae", "simclr"]
    both = math.sqrt(statistics.variance([0.90, 0.91, 0.95]) + statistics.variance([0.60, 0.62, 0.64]))
    assert made["simclr"]["knn_over"] == pytest.approx((0.92 - 0.62) / both)
    both = math.sqrt(statistics.variance([0.71, 0.72, 0.70]) + statistics.variance([0.70, 0.72, 0.74]))
    assert made["simclr"]["linear_over"] == pytest.approx((0.71 - 0.72) / both)
    assert made["mae"]["knn_over"] == pytest.approx(0.02 / 0.01)
    assert made["mae"]["linear_over"] == 0
    assert made["untrained small_vit"]["knn_over"] is None
    assert table.not_clear(list(made.values())) == ["gan", "mae"]


def test_the_table_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.show(CELLS, REFERENCES, [("dino, seed 2", "no such thing")], tmp_path / "table.md")
    said = capsys.readouterr().out
    assert "not more than 2 sd above untrained: gan, mae" in said
    assert "dino, seed 2 failed: no such thing" in said
    written = (tmp_path / "table.md").read_text().splitlines()
    assert "| simclr | 92.0 ± 2.6 | 71.0 ± 1.0 | +9.0 | -0.4 | 3.0 | 1,000 | 11 | 5.0 |" in written
    assert {line.count("|") for line in written} == {10}


def test_one_seed_has_no_spread() -> None:
    made = table.lines([row for row in CELLS if row["seed"] == 0], REFERENCES)
    assert [line["knn_over"] for line in made] == [None] * 6
    assert table.not_clear(made) == []
    assert str(made[-1]["knn"]) == "90.0"


class Engine:
    """Trains in no time: so many steps a second, after a start that takes a while."""

    def __init__(self, rate: float, start: float) -> None:
        self.rate, self.start, self.asked = rate, start, list[Numbers]()

    def __call__(self, cell: Cell, images: Set, work: Path, kept: Path, training: Numbers) -> Numbers:
        self.asked.append(training)
        most = training.get("max_seconds", math.inf)
        steps = min(training["steps"], int((most - self.start) * self.rate) if most < math.inf else training["steps"])
        return {"steps": steps, "seconds": self.start + steps / self.rate}


def test_as_many_steps_as_fit_into_the_budget(tmp_path: Path) -> None:
    results, engine = Results(tmp_path / "methods.json"), Engine(rate=40, start=1.0)

    def done(seed: int) -> Numbers:
        cell = Cell("digits", "simclr", seed, 20.0)
        return budget.within_budget(cell, DIGITS, tmp_path, tmp_path / "kept", results, engine)

    first = done(0)
    assert first["seconds"] == pytest.approx(20, rel=0.1)
    assert first["steps"] == pytest.approx(19 * 40, rel=0.1)
    assert engine.asked[0] == {"steps": budget.ENDLESS, "max_seconds": 4.0}
    assert len(engine.asked) == 3, "the short run's start weighs more, so the first run ended too early"
    done(1)
    assert len(engine.asked) == 4, "the speed is known by now"


def test_cells_that_are_done_are_not_run_again_and_a_failure_stops_nobody(tmp_path: Path) -> None:
    results, ran, broken = Results(tmp_path / "methods.json"), list[str](), {"gan"}
    cells = [Cell("digits", name, 0, 5.0) for name in ("simclr", "gan", "vae")]

    def measure(cell: Cell, images: Set, work: Path, results: Results) -> Numbers:
        ran.append(cell.method)
        if cell.method in broken:
            raise RuntimeError("no such thing")
        return {**vars(cell), "knn": 0.5, "linear": 0.5}

    with results.claimed(cells[2], tmp_path):  # somebody else's
        failed = command.fill(cells, DIGITS, tmp_path, results, measure)
    assert failed == [("gan, seed 0", "RuntimeError: no such thing")]
    broken.clear()
    assert command.fill(cells, DIGITS, tmp_path, results, measure) == []
    assert ran == ["simclr", "gan", "gan", "vae"]
    assert [row["method"] for row in results.read()["cells"]] == ["simclr", "gan", "vae"]
    command.fill([Cell("digits", "vae", 0, 6.0)], DIGITS, tmp_path, results, measure)
    assert ran[4:] == ["vae"], "another budget is another cell"


def test_two_that_start_together_make_the_part_of_the_folder_once(tmp_path: Path) -> None:
    bench_main.random_pictures(tmp_path / "all", per_class=5, classes=2, size=8)
    (tmp_path / "work").mkdir()

    def start(_: int) -> Set:
        with alone(tmp_path / "work" / "images.lock"):
            return command.images_of(tmp_path / "all", tmp_path / "work")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, range(2))
    assert first == second
    assert len(list(Path(first.folder).glob("train/*/*"))) == 10
    assert (tmp_path / "work" / "ingested" / Path(first.folder).name / "facts.json").exists()


def test_every_pretraining_recipe_takes_part_with_a_network_that_it_takes() -> None:
    wanted = command.chosen(None)
    assert {"simclr", "mae", "gan", "deepcluster"} < set(wanted)
    assert "image_classification" not in wanted
    networks = {network_of(name, DIGITS)["architecture"] for name in wanted if name not in REFERENCES}
    assert networks == {"small_cnn", "small_vit"}
    assert network_of("mae", DIGITS) == network_of("untrained small_vit", DIGITS)
    with pytest.raises(SystemExit, match=r"no method nonsense; there are: .*vicreg"):
        command.chosen("simclr,nonsense")


def test_the_pixels_of_the_digits_are_read_as_if_by_hand(tmp_path: Path) -> None:
    found = command.measure(Cell("digits", "pixels", 1, 5.0), DIGITS, tmp_path, Results(tmp_path / "methods.json"))
    pixels, labels, test = builtin.digits()
    flat = pixels.reshape(len(pixels), -1) - pixels[~test].mean()
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    accuracies: list[float] = []
    for draw in range(5, 10):  # five draws a seed
        rows = split_labels(torch.from_numpy(labels[~test]), Data(labels_per_class=10), seed=draw, validate=False).train
        bank, known = flat[~test][rows], labels[~test][rows]
        assert np.bincount(known).tolist() == [10] * 10
        correct = 0
        for query, truth in zip(flat[test], labels[test], strict=True):
            similarity = bank @ query
            votes = np.zeros(10)
            for near in similarity.argsort()[-20:]:
                votes[known[near]] += math.exp(similarity[near] / 0.07)
            correct += int(votes.argmax() == truth)
        accuracies.append(correct / len(labels[test]))
    assert found["knn"] == pytest.approx(statistics.fmean(accuracies), abs=0.002)
    assert found["architecture"] is None


def test_settled_norms_have_the_statistics_of_the_images(digits: DatasetFacts, tmp_path: Path) -> None:
    spec = sets.spec("image_classification", data={"validation_fraction": 0.0})
    made = assemble(sets.order(spec, digits, tmp_path), Reporter())
    backbone: Any = made.objective.backbone
    first = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda _module, given, _out: seen.append(given[0].detach().transpose(0, 1).flatten(1)))
    probes.settle_norms(backbone, made.data, made.device)
    assert sum(each.shape[1] for each in seen) % len(made.data.train) == 0
    torch.testing.assert_close(first.running_mean, seen[0].mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first.running_var, seen[0].var(1), atol=1e-5, rtol=1e-4)
    assert not backbone.training
