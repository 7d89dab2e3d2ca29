"""BYOL: its loss against the paper in loops, its views, its teacher, and learning."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.data.pair import ViewParams, byol_views
from worker.parts import compute, teacher
from worker.parts.seed import generator
from worker.pretrain import byol
from worker.recipe import Info, Progress
from worker.trainer.assembly import assemble

pytestmark = pytest.mark.worker


def naive_regression(prediction: Tensor, target: Tensor) -> list[float]:
    """Equation 2 of arXiv 2006.07733 by its second form, 2 - 2 * cosine, in loops."""
    found: list[float] = []
    for q, z in zip(prediction.double().tolist(), target.double().tolist(), strict=True):
        product = sum(a * b for a, b in zip(q, z, strict=True))
        found.append(2 - 2 * product / math.sqrt(sum(a * a for a in q)) / math.sqrt(sum(b * b for b in z)))
    return found


def test_the_loss_is_the_papers() -> None:
    q, z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3)).unbind(0)
    assert byol.regression(q, z).tolist() == pytest.approx(naive_regression(q, z), rel=1e-5)


def test_each_view_predicts_the_teacher_of_the_other(digits: DatasetFacts, tmp_path: Path) -> None:
    made = assemble(sets.order(sets.spec("byol"), digits, tmp_path), sets.Heard().reporter)
    module = compute.place(made.objective, made.plan, made.device).train()
    assert isinstance(module, byol.Byol)
    batch = made.data.ready(made.data.train.batch(torch.arange(8)), made.device, generator(0, "inputs", 0))
    loss = module(compute.laid_out(batch, made.plan), Progress(0, 1, 0, 1))["loss"]
    online = module.predictor(module.projector(module.backbone(batch["image"])))
    target = module.teacher(batch["image"])
    expected = sum(naive_regression(online, torch.cat([target[8:], target[:8]]))) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_the_teacher_follows_by_equation_one() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    copied = teacher.teacher_of(student)
    start = [parameter.clone() for parameter in copied.parameters()]
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    student(torch.randn(8, 3))  # moves the student's running statistics, which are not the teacher's
    teacher.follow(copied, student, momentum=0.9)
    for before, now, live in zip(start, copied.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * live)
        assert not now.requires_grad
    norm, dropout = copied.get_submodule("0.1"), copied.get_submodule("0.2")
    assert torch.equal(norm.get_buffer("running_mean"), torch.zeros(4))
    assert torch.equal(dropout(torch.ones(2, 4)), torch.ones(2, 4)), "a teacher drops nothing out"


def test_the_momentum_grows_to_one_along_a_cosine() -> None:
    def at(step: int, steps: int, start: float | None = None) -> float:
        return teacher.momentum(start, step=step, steps=steps, paper=0.996)

    assert at(0, 100_000) == pytest.approx(0.996)
    for step in (0, 25, 70, 100):
        expected = 1 - (1 - 0.9) * (math.cos(math.pi * step / 100) + 1) / 2
        assert at(step, 100, 0.9) == pytest.approx(expected)
    assert at(0, 300) == pytest.approx(0.99), "a hundred steps of three hundred are remembered"
    assert at(0, 1) == 0


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_the_second_view_alone_is_solarised_and_only_in_colour(size: int, channels: int) -> None:
    info = Info("unlabelled_images", (), 8, channels, size, 16, {})
    batch = {"image": torch.randint(0, 256, (256, channels, size, size), dtype=torch.uint8)}
    draw = byol_views(ViewParams(colour_strength=0.0, crop_min_scale=1.0, flip=0.0), info)
    made = draw(batch, generator(0, "inputs", 0))["image"]
    assert made.shape == (512, channels, size, size)
    if (size, channels) == (32, 3):  # neither blur nor affine moves here: what is left is greyscale and solarisation
        plain = batch["image"] / 255
        inverted = torch.where(plain >= 128 / 255, 1 - plain, plain)
        first, second = torch.stack(
            [F.l1_loss(v, inverted, reduction="none").mean((1, 2, 3)) < 1e-3 for v in made.chunk(2)]
        )
        assert first.sum() == 0
        assert second.float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.08)


def test_a_batch_too_small_is_refused(digits: DatasetFacts, tmp_path: Path) -> None:
    _, last = sets.failed(sets.order(sets.spec("byol", training={"batch_size": 2}), digits, tmp_path))
    assert last.error.code == "batch_too_small"


def test_pretraining_learns_digits_without_labels(tmp_path: Path) -> None:
    """k-NN on the features must beat k-NN on the features of the untrained network by seven points, in 288 steps.

    Less than the ten of others: without a term that pushes apart, this method is the slowest of those that compare two
    views, and two of three seeds stay below ten.
    """
    training = {"batch_size": 50, "epochs": 24, "learning_rate": 1e-3}
    spec = sets.spec("byol", model={"architecture": "small_cnn", "width": 0.25}, training=training)
    untrained, trained = sets.before_and_after(spec, tmp_path)
    assert trained > untrained + 0.07, (untrained, trained)
