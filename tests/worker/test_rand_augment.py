"""Batched RandAugment against torchvision's own, operation by operation and sample by sample."""

from typing import Any, cast

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment as Reference

from worker.data.policy import policy
from worker.data.rand_augment import BINS, OPERATIONS, RandAugment, apply, beside

pytestmark = pytest.mark.unit
SPACE = cast(dict[str, Any], Reference._AUGMENTATION_SPACE)
THEIR_NAMES = cast(dict[str, str], dict(zip(OPERATIONS, SPACE, strict=True)))
CAN_GO_TWO_WAYS = {name: SPACE[theirs][1] for name, theirs in THEIR_NAMES.items()}


def pictures(count: int, channels: int, height: int = 40, width: int = 32) -> torch.Tensor:
    """Smooth pictures with noise, so that histograms and neighbours look like those of photographs."""
    draws = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, channels, 4, 4, generator=draws) * 200 + 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + torch.randn(smooth.shape, generator=draws) * 6).clamp(0, 255).to(torch.uint8)


def theirs(image: torch.Tensor, name: str, level: int, sign: int) -> torch.Tensor:
    """Do what torchvision's RandAugment does with this bin."""
    reference: Any = Reference(num_magnitude_bins=BINS + 1)
    bins, _ = SPACE[THEIR_NAMES[name]]
    values = bins(BINS + 1, *image.shape[1:])
    magnitude = 0.0 if values is None else float(values[level]) * sign
    return reference._apply_image_or_video_transform(
        image, THEIR_NAMES[name], magnitude, interpolation=InterpolationMode.NEAREST, fill=reference._fill
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(name: str, channels: int) -> None:
    levels = [0, 1, 5, 9, 14, 20, 27, 30]
    images = pictures(2 * len(levels), channels)
    signs = [1] * len(levels) + [-1 if CAN_GO_TWO_WAYS[name] else 1] * len(levels)
    made = apply(
        images,
        torch.full((1, len(images)), OPERATIONS.index(name)),
        torch.tensor([levels * 2]) / BINS,
        torch.tensor([signs]),
    )
    expected = torch.stack([theirs(*each) for each in zip(images, [name] * 16, levels * 2, signs, strict=True)])
    off = (made.int() - expected.int()).abs()
    # What is cut to whole numbers may fall to the other side by the last bit of a float, by 1; what is turned may take
    # the other of two pixels that are equally near.
    turned = name in ("shear_x", "shear_y", "rotate")
    assert (off != 0).float().mean() < (0.005 if turned else 0.03)
    assert turned or off.max() <= 1
    if name not in ("identity", "colour"):
        assert not torch.equal(made, images)


def test_every_sample_gets_its_own_operations_in_its_own_order() -> None:
    images = pictures(60, 3, 20, 16)
    draws = torch.Generator().manual_seed(1)
    operations = torch.randint(len(OPERATIONS), (3, 60), generator=draws)
    levels, signs = torch.rand(3, 60, generator=draws), torch.randint(2, (3, 60), generator=draws) * 2 - 1
    together = apply(images, operations, levels, signs)
    for row in range(60):
        alone = images[row : row + 1]
        for step in range(3):
            one = (operations[step, row], levels[step, row], signs[step, row])
            alone = apply(alone, *(value.view(1, 1) for value in one))
        assert torch.equal(together[row], alone[0])


def test_draws_are_even_repeatable_and_as_strong_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("worker.data.rand_augment.apply", lambda *given: seen.append(given) or given[0])
    images = torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)
    for spread in (0.0, 0.0, 3.0):
        RandAugment(2, 12, spread)(images, torch.Generator().manual_seed(5))
    (_, operations, levels, signs), again, (_, _, spread_out, _) = seen
    assert torch.equal(operations, again[1])
    counts = torch.bincount(operations.flatten(), minlength=14)
    assert counts.min() > 8000 / 14 * 0.85
    assert counts.max() < 8000 / 14 * 1.15
    assert torch.equal(levels, torch.full((2, 4000), 0.4))
    assert abs(signs.float().mean()) < 0.05
    assert spread_out.mean().item() == pytest.approx(0.4, abs=0.01)
    assert spread_out.std().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("level", "channels"), [("none", 3), ("light", 3), ("strong", 3), ("standard", 1)])
def test_it_takes_the_place_of_a_policys_own_colours(level: Any, channels: int) -> None:
    images = pictures(32, channels, 32, 32)
    augment = beside(policy(level, image_size=32, channels=channels), RandAugment(2, 9))
    made = augment(images, torch.Generator().manual_seed(0))
    assert made.shape == images.shape
    assert torch.equal(made, augment(images, torch.Generator().manual_seed(0)))
    if level == "strong":
        assert made.dtype == torch.float32
        assert made.min() >= 0
        assert made.max() <= 1
        assert (made == 0).flatten(1).float().mean(1).gt(0.02).any(), "it still erases"
    else:
        assert made.dtype == torch.uint8


def test_a_policys_own_colours_and_turns_are_left_out() -> None:
    images = torch.full((32, 3, 32, 32), 100, dtype=torch.uint8)
    for level in ("standard", "strong"):
        view = policy(level, image_size=32, channels=3)
        made = beside(view, RandAugment(0))(images, torch.Generator().manual_seed(0))
        made = made if made.dtype == torch.uint8 else made.mul(255).round().to(torch.uint8)
        assert set(made.unique().tolist()) <= {0, 100}, "colours stay; a box may be erased"


def test_nothing_is_drawn_for_nothing() -> None:
    images = pictures(4, 3)
    assert torch.equal(RandAugment(0)(images, torch.Generator()), images)
