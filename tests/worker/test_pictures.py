"""Pictures as pixels: what lies where, in which colour, and that they are PNG."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.parts import pictures
from worker.parts.tuning import Plan
from worker.report import Planned
from worker.trainer import show

pytestmark = pytest.mark.worker


def read(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_small_images_are_shown_larger_and_large_ones_smaller() -> None:
    small = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 8, 8) * 60
    found = pictures.grid(small, columns=2)
    assert found.shape == (3, 2 * 66 + 2, 2 * 66 + 2)
    assert [int(found[0, y, x]) for y in (30, 100) for x in (30, 100)] == [0, 60, 120, 180]
    assert pictures.grid(torch.zeros(2, 3, 300, 300), columns=2).shape == (3, 98 + 2, 2 * 98 + 2)
    image = read(pictures.png(found))
    assert np.array_equal(image, found.permute(1, 2, 0).numpy())


def test_a_sheet_has_a_row_per_group_and_white_where_there_is_none() -> None:
    rows = [torch.zeros(3, 1, 64, 64, dtype=torch.uint8), torch.full((1, 1, 64, 64), 100, dtype=torch.uint8)]
    found = pictures.sheet(rows)
    assert found.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    assert [int(found[0, y, x]) for y in (30, 100) for x in (30, 100, 170)] == [0, 0, 0, 100, 255, 255]


def test_discs_lie_where_the_points_are_in_their_groups_colours() -> None:
    points = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    found = pictures.scatter(points, torch.tensor([0, 1, -1]), side=200, radius=5)
    dark = (found.float().mean(0) < 250).nonzero().float()
    assert len(dark) < 3 * 140
    shades = [*pictures.colours(2), pictures.GREY]
    low, high = 12, 188
    for (row, column), shade in zip(((high, low), (high, high), (low, low)), shades, strict=True):
        expected = torch.tensor(shade) * 0.75 + 0.25
        assert (found[:, row, column] / 255 - expected).abs().max() < 0.02, (row, column)
    turned = pictures.scatter(points.flip(0), torch.tensor([-1, 1, 0]), side=200, radius=5)
    assert torch.equal(found, turned), "the order of the points does not matter"


def test_points_that_cannot_be_told_apart_and_none_at_all() -> None:
    same = pictures.scatter(torch.ones(50, 2), torch.full((50,), -1))
    assert (same < 255).any()
    assert (pictures.scatter(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)) == 255).all()


def test_colours_differ() -> None:
    shades = torch.tensor(pictures.colours(24))
    assert torch.cdist(shades, shades).fill_diagonal_(9).min() > 0.1


def test_a_pretraining_job_leaves_a_map_that_costs_little(digits: DatasetFacts, tmp_path: Path) -> None:
    long = {"epochs": 8, "batch_size": 160}
    for training, shown in ((long, True), ({"epochs": 1, "batch_size": 40}, False)):
        order = sets.order(sets.spec("simclr", training=training), digits, tmp_path / str(shown))
        heard, last = sets.finished(order)
        plan = Plan.model_validate(heard.of(Planned)[0].plan)
        assert show.map_rows(plan) <= 0.09 * plan.steps * plan.batch_size
        assert ("embedding.png" in {file.name for file in last.files}) is shown
    assert read((Path(order.scratch).parent.parent / "True" / "scratch" / "embedding.png").read_bytes()).shape == (
        720, 720, 3,
    )  # fmt: skip
