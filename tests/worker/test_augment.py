"""Batched augmentation against torchvision's v2 functions, sample by sample."""

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as v2
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from worker.data import augment, policy

pytestmark = pytest.mark.unit


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 20, 16, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3


def test_a_moved_crop_is_pad_crop_and_mirror(images: torch.Tensor) -> None:
    images = (images * 255).to(torch.uint8)
    top, left, flip = torch.tensor([0, 3, 6, 1]), torch.tensor([6, 3, 0, 2]), torch.tensor([True, False, False, True])
    moved = augment.crop(images, top, left, flip, padding=3)
    for i, image in enumerate(images):
        expected = v2.crop(v2.pad(image, [3], padding_mode="reflect"), int(top[i]), int(left[i]), 20, 16)
        assert torch.equal(moved[i], v2.horizontal_flip(expected) if flip[i] else expected)


def test_upside_down_is_torchvisions_and_drawn_for_each_sample(images: torch.Tensor) -> None:
    flip = torch.arange(len(images)) % 2 == 0
    turned = augment.upside_down(images, flip)
    for i, image in enumerate(images):
        assert torch.equal(turned[i], v2.vertical_flip(image) if flip[i] else image)
    many = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(400, 1, 1, 1)
    drawn = policy.View(8, vertical_flip=0.25)(many, torch.Generator().manual_seed(0))
    turned_rows = (drawn[:, 0, 0, 0] != 0).float().mean().item()
    assert turned_rows == pytest.approx(0.25, abs=0.06)
    assert drawn.dtype == torch.uint8


@pytest.mark.parametrize("size", [8, 32])
def test_a_resized_crop_is_torchvisions(images: torch.Tensor, size: int) -> None:
    top, left = torch.tensor([0.0, 3.0, 5.0, 10.0]), torch.tensor([0.0, 1.0, 9.0, 4.0])
    tall, wide = torch.tensor([20.0, 9.0, 12.0, 10.0]), torch.tensor([16.0, 15.0, 7.0, 5.0])
    flip = torch.tensor([False, True, False, True])
    made = augment.resample(
        images,
        augment.resize_matrix(top, tall, source=20, size=size),
        augment.resize_matrix(left, wide, source=16, size=size, flip=flip),
    )
    for i, image in enumerate(images):
        box = [int(part[i]) for part in (top, left, tall, wide)]
        expected = v2.resized_crop(image, *box, size=[size, size], antialias=True)
        expected = v2.horizontal_flip(expected) if flip[i] else expected
        torch.testing.assert_close(made[i], expected, atol=1e-5, rtol=0)


def test_blur_is_torchvisions(images: torch.Tensor) -> None:
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    blurred = augment.resample(
        images, augment.blur_matrix(sigma, size=20, kernel_size=5), augment.blur_matrix(sigma, size=16, kernel_size=5)
    )
    for i, image in enumerate(images):
        expected = v2.gaussian_blur(image, [5, 5], [float(sigma[i])] * 2)
        torch.testing.assert_close(blurred[i], expected, atol=1e-5, rtol=0)


def test_an_affine_move_is_torchvisions(images: torch.Tensor) -> None:
    angle, shear = torch.tensor([0.0, 30.0, -12.0, 5.0]), torch.tensor([0.0, 10.0, -5.0, 20.0])
    translate = torch.tensor([[2.0, 0.0], [0.0, -3.0], [1.5, 2.5], [0.0, 0.0]])
    scale = torch.tensor([1.0, 1.2, 0.8, 0.9])
    moved = augment.affine(images, angle, translate, scale, shear)
    for i, image in enumerate(images):
        expected = v2.affine(
            image, float(angle[i]), translate[i].tolist(), float(scale[i]), [float(shear[i]), 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )  # fmt: skip
        torch.testing.assert_close(moved[i], expected, atol=1e-4, rtol=0)


def test_a_move_by_whole_pixels_is_an_affine_one(images: torch.Tensor) -> None:
    right, down, none = torch.tensor([2, 0, -3, 30]), torch.tensor([0, -5, 4, 1]), torch.zeros(4)
    expected = augment.affine(images, none, torch.stack([right, down], 1).float(), none + 1, none)
    torch.testing.assert_close(augment.translate(images, right, down), expected, atol=1e-4, rtol=0)
    assert torch.equal(augment.translate(images[:1], right[:1], down[:1])[0, :, :, 2:], images[0, :, :, :-2])


def test_a_move_by_whole_pixels_can_be_differentiated_twice() -> None:
    images = torch.rand(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    right, down = torch.tensor([0, 2, -1]), torch.tensor([1, -1, 7])
    assert torch.autograd.gradcheck(lambda given: augment.translate(given, right, down), images)
    assert torch.autograd.gradgradcheck(lambda given: augment.translate(given, right, down).square(), images)


def test_a_move_that_comes_alone_is_by_whole_pixels_and_changes_no_other_draw() -> None:
    ones = torch.ones(64, 1, 16, 16)
    view = policy.View(16, translate=0.25)
    moved = view(ones, torch.Generator().manual_seed(0))
    assert set(moved.flatten().tolist()) == {0.0, 1.0}
    assert 4 < moved.mean((1, 2, 3)).unique().numel() < 26, "each by its own draw, up to four pixels"
    after = [torch.Generator().manual_seed(0) for _ in range(2)]
    view(ones, after[0])
    replace(view, rotate=1.0)(ones, after[1])
    assert torch.equal(after[0].get_state(), after[1].get_state())


def test_a_chain_of_colour_changes_is_torchvisions(images: torch.Tensor) -> None:
    brightness, contrast = torch.tensor([1.0, 0.8, 1.2, 0.9]), torch.tensor([1.0, 1.3, 0.5, 0.8])
    saturation = torch.tensor([1.0, 0.0, 1.2, 0.6])
    changed = augment.Colour(images).brightness(brightness).contrast(contrast).saturation(saturation).apply()
    for i, image in enumerate(images):
        expected = v2.adjust_brightness(image, float(brightness[i]))
        expected = v2.adjust_contrast(expected, float(contrast[i]))
        expected = v2.adjust_saturation(expected, float(saturation[i]))
        torch.testing.assert_close(changed[i], expected, atol=2e-4, rtol=0)
    grey = v2.rgb_to_grayscale(images[1:2], num_output_channels=3)
    made = augment.Colour(images[1:2]).saturation(torch.zeros(1)).apply()
    torch.testing.assert_close(made, grey, atol=1e-3, rtol=0)


def test_a_turn_of_hue_is_torchvisions_also_in_the_middle_of_a_chain(images: torch.Tensor) -> None:
    turn, factor = torch.tensor([0.1, -0.1, 0.5, -0.25]), torch.tensor([0.8, 1.2, 0.9, 1.0])
    changed = augment.Colour(images).brightness(factor).hue(turn).contrast(factor).apply()
    for i, image in enumerate(images):
        expected = v2.adjust_hue(v2.adjust_brightness(image, float(factor[i])), float(turn[i]))
        expected = v2.adjust_contrast(expected, float(factor[i]))
        torch.testing.assert_close(changed[i], expected, atol=2e-4, rtol=0)
    grey = torch.full((4, 3, 2, 2), 0.4)
    assert torch.equal(augment.Colour(grey).hue(turn).apply(), grey)


def test_solarise_and_erase_are_torchvisions(images: torch.Tensor) -> None:
    solarised = augment.solarise(images, torch.tensor([0.5, 2.0, 0.4, 0.6]))
    erased = augment.erase(images, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 2, 5]),
                           torch.tensor([3, 3, 3, 3]))  # fmt: skip
    for i, (threshold, box) in enumerate([(0.5, (1, 0, 4, 3)), (1.0, (2, 1, 0, 3)), (0.4, (3, 2, 2, 3)),
                                          (0.6, (4, 3, 5, 3))]):  # fmt: skip
        torch.testing.assert_close(solarised[i], v2.solarize(images[i], threshold))
        torch.testing.assert_close(erased[i], v2.erase(images[i], *box, v=torch.zeros(3, 1, 1)))


def test_mixup_blends_and_cutmix_pastes(images: torch.Tensor) -> None:
    batch = {"image": images, "label": torch.tensor([0, 1, 2, 1])}
    partner = torch.tensor([1, 0, 3, 2])
    mixed = augment.mixup(batch, torch.tensor([0.7, 1.0, 0.5, 0.0]), partner, classes=3)
    torch.testing.assert_close(mixed["image"][0], images[0] * 0.7 + images[1] * 0.3)
    torch.testing.assert_close(mixed["target"][0], torch.tensor([0.7, 0.3, 0.0]))
    top, left, tall, wide = (torch.full((4,), value) for value in (2, 3, 10, 8))
    pasted = augment.cutmix(batch, top, left, tall, wide, partner, classes=3)
    torch.testing.assert_close(pasted["image"][0, :, 2:12, 3:11], images[1, :, 2:12, 3:11])
    torch.testing.assert_close(pasted["image"][0, :, 12:], images[0, :, 12:])
    torch.testing.assert_close(pasted["target"][0], torch.tensor([0.75, 0.25, 0.0]))


def test_mixup_and_cutmix_are_torchvisions(images: torch.Tensor) -> None:
    # Theirs roll the batch by one and draw one share for all of it; so that is what ours are told here.
    labels, partner = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 0, 1, 2])
    batch = {"image": images, "label": labels}
    torch.manual_seed(4)
    their_images, their_targets = transforms.MixUp(num_classes=3)(images, labels)
    share = their_targets[1, 1]
    ours = augment.mixup(batch, share.expand(4), partner, classes=3)
    torch.testing.assert_close(ours["image"], their_images)
    torch.testing.assert_close(ours["target"], their_targets)
    their_images, their_targets = transforms.CutMix(num_classes=3)(images, labels)
    pasted = (their_images == images.roll(1, 0)).all(1).all(0)  # bool [height, width]
    rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
    box = (int(rows[0]), int(columns[0]), len(rows), len(columns))
    top, left, tall, wide = (torch.full((4,), edge) for edge in box)
    ours = augment.cutmix(batch, top, left, tall, wide, partner, classes=3)
    assert 0 < pasted.float().mean() < 1
    torch.testing.assert_close(ours["image"], their_images)
    torch.testing.assert_close(ours["target"], their_targets)


@pytest.mark.parametrize("level", ["light", "standard", "strong"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (64, 3), (64, 1)])
def test_a_policy_draws_for_each_sample_and_again_the_same(level: policy.Level, size: int, channels: int) -> None:
    image = torch.randint(256, (1, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    augmented = policy.policy(level, image_size=size, channels=channels)
    assert augmented is not None
    batch = image.repeat(16, 1, 1, 1)
    first, again = (augment.to_float(augmented(batch, torch.Generator().manual_seed(5))) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == batch.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert len({tuple(row.flatten().tolist()) for row in first}) > 4, "each sample has its own draw"


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_two_views_differ(size: int, channels: int) -> None:
    batch = torch.randint(256, (5, channels, size, size), dtype=torch.uint8)
    pair = policy.views(policy.simclr_view(image_size=size, channels=channels), 2)(batch, torch.Generator())
    assert pair.shape == (10, channels, size, size)
    assert not torch.equal(pair[:5], pair[5:])


def test_mixing_keeps_the_sum_of_the_targets() -> None:
    batch = {"image": torch.rand(64, 3, 8, 8), "label": torch.arange(64) % 5}
    for mixup, cutmix in ((0.2, 0.0), (0.0, 1.0), (0.5, 0.5)):
        mixed = policy.mix(batch, torch.Generator().manual_seed(0), mixup=mixup, cutmix=cutmix, classes=5)
        torch.testing.assert_close(mixed["target"].sum(1), torch.ones(64))
        assert not torch.equal(mixed["image"], batch["image"])
    assert policy.mix(batch, torch.Generator(), mixup=0, cutmix=0, classes=5) is batch


def test_every_sample_is_mirrored_or_not_by_its_own_draw() -> None:
    slope = torch.arange(16, dtype=torch.float32).expand(64, 1, 16, 16) / 16
    for view in (policy.View(16, crop_padding=1, flip=0.5), policy.View(16, flip=0.5)):
        seen = view(slope, torch.Generator().manual_seed(2))
        mirrored = seen[:, 0, 8, 3] > seen[:, 0, 8, 12]
        assert 20 < mirrored.sum() < 44


def test_a_resized_crop_keeps_the_share_it_was_asked_for() -> None:
    view = policy.View(32, crop_scale=(0.25, 0.5))
    _, _, tall, wide = view._boxes(4000, 32, 32, torch.Generator().manual_seed(0))
    area = tall * wide / 32**2
    assert area.min() > 0.2
    assert area.max() < 0.55
    assert area.mean().item() == pytest.approx(0.375, abs=0.01)
    assert (wide / tall).log().mean().abs() < 0.02
