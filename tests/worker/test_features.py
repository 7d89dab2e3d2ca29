"""The cache of what a frozen prefix gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.data import features
from worker.data.features import Features, cache_prefix
from worker.data.shelf import Shelf
from worker.report import Planned
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker


@pytest.fixture
def made(digits: DatasetFacts, tmp_path: Path) -> Assembly:
    body = sets.spec(params={"trainable": "last:1", "augmentation": "light"})
    return assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)


def cached(made: Assembly, folder: Path, budget: int = 10**9, **given: Any) -> Features | None:
    options: dict[str, Any] = {"views": 1, "seed": 0, "augmented": False, "key": "k", **given}
    prefix: nn.Module = made.objective.frozen_prefix  # type: ignore[assignment]
    return cache_prefix(
        made.data.train, made.data, prefix, plan=made.plan, device=made.device, shelf=Shelf(folder, budget),
        reporter=sets.Heard().reporter, **options,
    )  # fmt: skip


def test_a_row_is_what_the_prefix_gives_to_the_nearest_bfloat16(made: Assembly, tmp_path: Path) -> None:
    found = cached(made, tmp_path / "f")
    assert found is not None
    rows = torch.tensor([3, 100, 0])
    prefix: nn.Module = made.objective.frozen_prefix  # type: ignore[assignment]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=made.plan.precision == "bfloat16"):
        expected = prefix.eval()(made.data.ready(made.data.train.batch(rows), made.device)["image"])
    batch = found.batch(rows)
    torch.testing.assert_close(batch["prefix"], expected.float(), atol=0.02, rtol=0.02)
    assert torch.equal(batch["label"], made.data.train.labels[rows])
    assert len(found) == len(made.data.train)


def test_a_network_that_autocast_computes_low_throughout_is_converted_once(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = sets.spec(
        model={"architecture": "resnet18", "image_size": 32}, params={"trainable": "head", "augmentation": "none"},
        training={"precision": "bfloat16", "batch_size": 16, "epochs": 1},
    )  # fmt: skip
    made = assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)
    before = cached(made, tmp_path / "once")
    monkeypatch.setattr(features, "is_plain", lambda _: False)
    cast_in_every_pass = cached(made, tmp_path / "always")
    assert before is not None
    assert cast_in_every_pass is not None
    torch.testing.assert_close(before.values, cast_in_every_pass.values, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("trainable", ["head", "last:1"])
def test_a_frozen_network_whose_last_maps_are_products_trains_from_its_cache(
    trainable: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    body = sets.spec(
        model={"architecture": "resnet18", "image_size": 32}, params={"trainable": trainable, "augmentation": "none"},
        training={"precision": "bfloat16", "batch_size": 64, "steps": 3},
    )  # fmt: skip
    heard, _ = sets.finished(sets.order(body, digits, tmp_path))
    assert heard.of(Planned)[0].plan["small_map_products"]
    assert "features.cached" in heard.codes()


def test_views_take_turns_from_epoch_to_epoch(made: Assembly, tmp_path: Path) -> None:
    found = cached(made, tmp_path / "f", views=3, augmented=True)
    assert found is not None
    rows = torch.tensor([5, 6])
    views = [found.batch(rows, epoch)["prefix"] for epoch in range(6)]
    for epoch in range(3):
        assert torch.equal(views[epoch], views[epoch + 3])
        assert not torch.equal(views[epoch], views[(epoch + 1) % 3])


def test_the_key_tells_apart_what_differs(made: Assembly, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {}, {}, {"key": "other"}, {"views": 2, "augmented": True}, {"views": 2, "augmented": True, "seed": 1},
    ]  # fmt: skip
    for given in variants:
        cached(made, tmp_path / "f", **given)
    assert len(list((tmp_path / "f").glob("[!.]*"))) == 4


def test_what_does_not_fit_is_not_cached(made: Assembly, tmp_path: Path) -> None:
    assert cached(made, tmp_path / "f", budget=1000) is None


def test_a_digest_follows_the_weights() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert features.digest(one) == features.digest(other)
    with torch.no_grad():
        other.weight[0, 0] += 1e-7 + other.weight[0, 0].abs() * 1e-6
    assert features.digest(one) != features.digest(other)
