"""Alternating mirrors: in any two epochs every sample is seen once as it is and once mirrored."""

from typing import Any

import pytest
import torch

from worker.data.mirror import alternating, first_mirrored
from worker.finetune.image_classification import ClassificationParams, inputs
from worker.recipe import Info

pytestmark = pytest.mark.unit


def batch(rows: torch.Tensor, epoch: int, channels: int = 3) -> dict[str, torch.Tensor]:
    """Give samples that grow brighter to the right, so that a mirrored one is told by its first and last column."""
    slope = torch.arange(16, dtype=torch.uint8) * 10
    image = slope.expand(len(rows), channels, 16, 16).clone()
    return {"image": image, "label": rows % 3, "index": rows, "epoch": torch.full_like(rows, epoch)}


def mirrored(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 8, 2] > images[:, 0, 8, 13]


def prepared(rows: torch.Tensor, epoch: int, *, seed: int = 0, channels: int = 3, **params: Any) -> torch.Tensor:
    info = Info(
        task="image_classification", classes=("a", "b", "c"), samples=len(rows), channels=channels, image_size=16,
        feature_dimension=8, architecture={}, seed=seed,
    )  # fmt: skip
    prepare = inputs(ClassificationParams(mirror="alternating", **params), info)
    return mirrored(prepare(batch(rows, epoch, channels), torch.Generator().manual_seed(epoch))["image"])


def test_a_sample_is_mirrored_in_exactly_every_other_epoch() -> None:
    rows = torch.arange(200)
    seen = torch.stack([prepared(rows, epoch) for epoch in range(6)])
    assert torch.equal(seen[0], ~seen[1])
    for epoch in range(4):
        assert torch.equal(seen[epoch], seen[epoch + 2])
    assert 70 < seen[0].sum() < 130


def test_it_depends_on_the_seed_the_epoch_and_the_number_alone() -> None:
    rows = torch.arange(500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(prepared(rows[order], 3), prepared(rows, 3)[order])
    assert 180 < (prepared(rows, 3, seed=1) != prepared(rows, 3)).sum() < 320


def test_the_coin_is_fair_for_any_stride_and_any_seed() -> None:
    for seed in (0, 1, 2**31 - 1):
        for stride in (1, 2, 10, 64, 5000):
            coins = first_mirrored(torch.arange(2000) * stride, seed).float()
            assert set(coins.unique().tolist()) == {0, 1}
            assert coins.mean().item() == pytest.approx(0.5, abs=0.05)
            together = (coins[:-1] == coins[1:]).float().mean().item()
            assert together == pytest.approx(0.5, abs=0.05), "neighbours toss their own coins"


def test_a_mirrored_image_is_its_columns_in_reverse() -> None:
    given = batch(torch.arange(40), 0)
    made = alternating(given, 0)
    for one, image in zip(made["image"], given["image"], strict=True):
        assert torch.equal(one, image) or torch.equal(one, image.flip(2))


def test_what_is_never_mirrored_is_not_mirrored_in_turn_either() -> None:
    rows = torch.arange(50)
    for epoch in (0, 1):
        assert not prepared(rows, epoch, channels=1).any(), "a mirrored digit is another sign"
        assert not prepared(rows, epoch, augmentation="none", mixup=1e-3).any()


def test_it_goes_with_rand_augment_and_every_level() -> None:
    rows = torch.arange(100)
    for level in ("light", "standard"):
        first, second = (prepared(rows, epoch, augmentation=level) for epoch in (0, 1))
        assert (first != second).float().mean() > 0.9
    first, second = (prepared(rows, epoch, rand_augment={"operations": 1}) for epoch in (0, 1))
    assert (first != second).float().mean() > 0.6
