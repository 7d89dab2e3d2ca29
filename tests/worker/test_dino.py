"""DINO: its loss against the paper in loops, crops of two sizes, the centre over two processes, and learning."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from tests.worker import sets
from tests.worker.forked import in_two_processes
from tests.worker.unordered import unordered
from worker.parts import other_sizes
from worker.parts.architectures import facts
from worker.parts.backbones import build_backbone
from worker.parts.seed import generator
from worker.pretrain import dino
from worker.recipe import Info, Progress

pytestmark = pytest.mark.worker
FACTS = {row["name"]: row["facts"] for row in facts()}
START = Progress(0, 10, 0, 2)


def info_of(name: str, *, channels: int = 3, size: int = 8, dimension: int = 32) -> Info:
    return Info("unlabelled_images", (), 64, channels, size, dimension, FACTS[name])


def made(*, channels: int = 3, size: int = 8, network: dict[str, Any] = sets.NETWORK, **params: Any) -> dino.Dino:
    backbone = build_backbone(network, channels=channels, image_size=size, seed=0)
    info = info_of(network["architecture"], channels=channels, size=size, dimension=cast(Any, backbone).dimension)
    return dino.Dino(dino.DinoParams.model_validate(params), backbone, info)


def naive(student: Tensor, teacher: Tensor, centre: Tensor, tau_student: float, tau_teacher: float) -> float:
    """Equations 1 to 3 of arXiv 2104.14294 in loops: outputs [views, batch, K] of student and teacher."""

    def softmax(values: list[float], temperature: float) -> list[float]:
        powers = [math.exp(value / temperature) for value in values]
        return [power / sum(powers) for power in powers]

    total, terms = 0.0, 0
    for t in range(2):
        for s in range(len(student)):
            if s == t:
                continue
            for n in range(student.shape[1]):
                said = softmax((teacher[t, n] - centre).double().tolist(), tau_teacher)
                heard = softmax(student[s, n].double().tolist(), tau_student)
                total -= sum(p * math.log(q) for p, q in zip(said, heard, strict=True))
            terms += student.shape[1]
    return total / terms


@pytest.mark.parametrize("crops", [0, 3])
def test_the_loss_is_the_papers(crops: int) -> None:
    draws = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2 + crops, 4, 6, generator=draws), torch.randn(2, 4, 6, generator=draws)
    centre = torch.randn(6, generator=draws)
    found = dino.cross_entropies((student / 0.3).log_softmax(2), ((teacher - centre) / 0.2).softmax(2))
    assert found.item() == pytest.approx(naive(student, teacher, centre, 0.3, 0.2), rel=1e-5)


@pytest.mark.parametrize(("size", "local"), [(8, 8), (32, 14)])
def test_forward_compares_all_crops_with_the_teachers(size: int, local: int) -> None:
    module = made(size=size).eval()
    assert module.get_buffer("centre").normal_().shape == (2048,)
    batch = {"image": torch.randn(6, 3, size, size), "image_local": torch.randn(12, 3, local, local)}
    loss = module(batch, START)["loss"]
    features = torch.cat([other_sizes.features_of(module.backbone, batch[name]) for name in batch])
    student, teacher = module.projector(features), module.teacher(batch["image"])
    expected = naive(student.view(6, 3, -1), teacher.view(2, 3, -1), module.get_buffer("centre"), 0.1, 0.04)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    loss.backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_the_centre_follows_the_teachers_mean_and_the_last_layer_waits() -> None:
    module = made(centre_momentum=0.8).train()
    batches = [{"image": torch.randn(8, 3, 8, 8)} for _ in range(2)]  # two micro-batches of one step
    said = torch.cat([module.teacher(batch["image"]) for batch in batches])
    for batch in batches:
        module(batch, START)["loss"].backward()
    assert not module.get_buffer("centre").any(), "it moves after the step"
    module.after_backward(START)
    assert module.projector.prototypes.grad is None
    module.after_step(START)
    torch.testing.assert_close(module.get_buffer("centre"), 0.2 * said.mean(0))
    module(batches[0], Progress(5, 10, 1, 2))["loss"].backward()
    module.after_backward(Progress(5, 10, 1, 2))
    assert module.projector.prototypes.grad is not None
    before = module.get_buffer("centre").clone()
    module._means.clear()
    module.eval()(batches[0], START)
    assert not module._means, "what is looked at for validation is not of the next step"
    assert torch.equal(module.get_buffer("centre"), before)


def test_the_last_layer_has_no_magnitude() -> None:
    head = dino.Head(4, 8, 5, 7)
    x = torch.randn(3, 4)
    before = head(x)
    with torch.no_grad():
        head.prototypes.mul_(torch.rand(7, 1) * 9 + 1)
    torch.testing.assert_close(head(x), before)
    assert before.abs().max() <= 1.0001


def test_temperature_and_weight_decay_are_scheduled() -> None:
    params = dino.DinoParams(teacher_temperature=0.07)
    at = [dino.teacher_temperature(params, Progress(step, 100, 0, 1)) for step in (0, 15, 30, 99)]
    assert at == pytest.approx([0.04, 0.055, 0.07, 0.07])
    auto = [dino.teacher_temperature(dino.DinoParams(), Progress(steps // 2, steps, 0, 1)) for steps in (400, 10**6)]
    assert auto == pytest.approx([0.04, 0.07]), "soft targets are for long runs"
    module = made()
    assert [module.at_step(Progress(step, 100, 0, 1))["weight_decay"] for step in (0, 50, 100)] == pytest.approx(
        [1, 5.5, 10]
    )


def _images() -> Tensor:
    return torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.filterwarnings("ignore")
def test_two_processes_have_one_centre(tmp_path: Path) -> None:
    def half(rank: int) -> list[float]:
        module = made(network={"architecture": "mlp", "hidden": [16]})
        module({"image": _images()[:, 4 * rank : 4 * rank + 4].flatten(0, 1)}, START)
        module.after_step(START)
        return module.get_buffer("centre").tolist()

    found = in_two_processes(half, tmp_path)
    module = made(network={"architecture": "mlp", "hidden": [16]})
    module({"image": _images().flatten(0, 1)}, START)
    module.after_step(START)
    for centre in found:
        torch.testing.assert_close(torch.tensor(centre), module.get_buffer("centre"), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64)])
def test_crops_come_in_two_sizes(channels: int, size: int) -> None:
    draw = dino.inputs(dino.DinoParams(), info_of("small_cnn", channels=channels, size=size))
    batch = {"image": torch.randint(0, 256, (4, channels, size, size), dtype=torch.uint8)}
    found = draw(batch, generator(0, "inputs", 0))
    local = {8: 8, 32: 14, 64: 27}[size]
    assert found["image"].shape == (8, channels, size, size)
    assert all(found[name].min() >= 0 and found[name].max() <= 1 for name in found)
    assert ("image_local" in found) == (size > 32)
    asked = dino.inputs(dino.DinoParams(local_crops=3), info_of("small_cnn", channels=channels, size=size))
    assert asked(batch, generator(0, "inputs", 0))["image_local"].shape == (12, channels, local, local)
    if size > 32:
        assert found["image_local"].shape == (32, channels, local, local)
    assert "image_local" not in dino.inputs(dino.DinoParams(local_crops=0), info_of("small_cnn"))(
        {"image": torch.zeros(2, 3, 8, 8)}, generator(0, "inputs", 0)
    )


@pytest.mark.parametrize(
    ("name", "size", "local"),
    [("resnet18", 224, 96), ("vit_b_16", 224, 96), ("vit_b_32", 224, 96), ("small_vit", 32, 16), ("mlp", 32, 32),
     ("maxvit_t", 224, 224), ("small_cnn", 16, 16)],
)  # fmt: skip
def test_the_smaller_size_suits_the_network(name: str, size: int, local: int) -> None:
    assert other_sizes.smaller_size(FACTS[name], size) == local


def test_a_vits_positions_are_interpolated() -> None:
    vit = build_backbone(sets.SMALL_VIT, channels=3, image_size=32, seed=0).eval()
    positions = cast(Any, vit).encoder.pos_embedding
    with torch.no_grad():
        side = torch.linspace(-1, 1, 16)
        positions[:, 1:] = (
            torch.stack([side[:, None].expand(16, 16), side.expand(16, 16)], 2).reshape(1, 256, 2).repeat(1, 1, 16)
        )
    seen: list[Tensor] = []
    cast(nn.Module, cast(Any, vit).encoder.layers).register_forward_hook(lambda _m, given, _o: seen.append(given[0]))
    cast(nn.Parameter, cast(Any, vit).conv_proj.weight).data.zero_()
    cast(nn.Parameter, cast(Any, vit).conv_proj.bias).data.zero_()
    assert other_sizes.features_of(vit, torch.randn(2, 3, 16, 16)).shape == (2, 32)
    square = seen[0][0, 1:, :2].view(8, 8, 2)
    assert square[0, 0].tolist() == pytest.approx([-1, -1], abs=1e-4), "the corners stay the corners"
    assert square[7, 0].tolist() == pytest.approx([1, -1], abs=1e-4)
    assert square[:, 3, 0].tolist() == pytest.approx(torch.linspace(-1, 1, 8).tolist(), abs=0.02)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other_sizes.features_of(vit, images), vit(images))


def test_positions_are_interpolated_as_by_torch_with_a_gradient_that_repeats() -> None:
    square = torch.randn(1, 5, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for side in (1, 3, 4, 9):
        expected = nn.functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=True)
        with torch.autocast("cpu"):
            found = other_sizes._resized(square, side)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (unordered(found.sum()), unordered(expected.sum())) == ([], ["UpsampleBicubic2DBackward0"])


def test_without_small_crops_the_large_ones_begin_smaller() -> None:
    corner = torch.zeros(1024, 3, 32, 32, dtype=torch.uint8)
    corner[:, :, 12:, 12:] = 255  # a crop of more than 0.4 of the area cannot be all white
    plain = {"colour_strength": 0.0}
    white = [
        draw({"image": corner}, generator(0, "inputs", 0))["image"][:1024].amin((1, 2, 3)).gt(0.99).sum().item()
        for draw in (
            dino.inputs(dino.DinoParams.model_validate({**plain, **given}), info_of("small_cnn", size=32))
            for given in ({"local_crops": 2}, {})
        )
    ]
    assert white[0] == 0
    assert white[1] > 0


@pytest.mark.parametrize(("network", "normed"), [(sets.NETWORK, True), (sets.SMALL_VIT, False)])
def test_the_head_has_batch_norm_where_the_network_is_convolutional(network: dict[str, Any], normed: bool) -> None:
    module = made(network=network)
    assert any(isinstance(layer, nn.BatchNorm1d) for layer in module.projector.modules()) is normed
    assert module.couples_batch is normed
    other = made(network=network, batch_norm=not normed)
    assert any(isinstance(layer, nn.BatchNorm1d) for layer in other.projector.modules()) is not normed


def test_a_crop_size_that_the_network_does_not_take_is_refused() -> None:
    with pytest.raises(UserFault, match=r"params\.local_crop_size"):
        made(network={"architecture": "mlp", "hidden": [16]}, size=32, local_crop_size=16)


def test_a_batch_too_small_is_refused(digits: DatasetFacts, tmp_path: Path) -> None:
    _, last = sets.failed(sets.order(sets.spec("dino", training={"batch_size": 2}), digits, tmp_path))
    assert last.error.code == "batch_too_small"


def test_pretraining_learns_digits_without_labels(tmp_path: Path) -> None:
    """k-NN on the features must beat k-NN on the features of the untrained network by five points, in 432 steps.

    With the batch, the rate, the temperatures and the crops that the recipe chooses by itself.
    """
    training = {"batch_size": "auto", "epochs": 24}
    spec = sets.spec("dino", model={"architecture": "small_cnn", "width": 0.25}, training=training)
    untrained, trained = sets.before_and_after(spec, tmp_path)
    assert trained > untrained + 0.05, (untrained, trained)
