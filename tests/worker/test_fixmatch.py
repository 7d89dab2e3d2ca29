"""FixMatch against a naive second implementation: its loss, and the threshold that follows the network."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain.datasets import DatasetFacts
from tests.worker.half_labelled import START, job, made
from worker.parts.fixmatch import consistency, follow
from worker.recipe import Progress

pytestmark = pytest.mark.worker


def naive_cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(value - logits[label]) for value in logits))


def test_the_loss_of_fixmatch_is_that_of_a_naive_second_implementation(digits: DatasetFacts, tmp_path: Path) -> None:
    """Equations 3 and 4, sample by sample."""
    draws = torch.Generator().manual_seed(0)
    weak, strong = (torch.randn(12, 1, 8, 8, generator=draws) for _ in range(2))
    first: Any = made(digits, tmp_path, job()).objective.eval()
    threshold = first.evaluate({"image": weak})["logits"].softmax(1).amax(1).median().item() - 1e-4
    body = job(weight=0.7, objective_params={"threshold": threshold})
    objective: Any = made(digits, tmp_path, body).objective.eval()  # batch norm ties no samples together
    labels = torch.tensor([3, -1, -1, 0, -1, -1, -1, -1, 9, -1, -1, -1])
    found = objective({"image": weak, "image_strong": strong, "label": labels}, START)
    says = [objective.head(objective.backbone(images)).tolist() for images in (weak, strong)]
    supervised = [naive_cross_entropy(says[0][row], int(label)) for row, label in enumerate(labels) if label >= 0]
    unsupervised, confident = 0.0, 0
    for row in (row for row, label in enumerate(labels) if label < 0):
        parts = [math.exp(value) for value in says[0][row]]
        best = max(range(10), key=lambda number: parts[number])
        if parts[best] / sum(parts) >= threshold:
            unsupervised += naive_cross_entropy(says[1][row], best) / 9
            confident += 1
    assert 0 < confident < 9
    assert found["supervised"].item() == pytest.approx(sum(supervised) / 3, rel=1e-4)
    assert found["unsupervised"].item() == pytest.approx(unsupervised, rel=1e-4)
    assert found["loss"].item() == pytest.approx(sum(supervised) / 3 + 0.7 * unsupervised, rel=1e-4)
    assert found["confident"].item() == pytest.approx(confident / 9)


def test_no_gradient_flows_through_the_weak_view() -> None:
    weak, strong = (torch.randn(4, 3).requires_grad_() for _ in range(2))
    consistency(weak, strong, threshold=0.0)[0].sum().backward()
    assert weak.grad is None
    assert strong.grad is not None


def test_the_threshold_is_the_mean_confidence_so_far_up_to_the_papers(digits: DatasetFacts, tmp_path: Path) -> None:
    objective: Any = made(digits, tmp_path, job()).objective.train()
    threshold = objective.get_buffer("threshold")
    assert threshold.item() == pytest.approx(0.1), "of ten classes"
    labels = torch.tensor([3, -1, -1, 0, -1, -1])
    told: list[float] = []
    objective._logits = lambda images: images  # what it is shown is what it says
    for number in range(2):  # two micro-batches of one step
        weak = torch.randn(6, 10, generator=torch.Generator().manual_seed(number)) * 2
        found = objective({"image": weak, "image_strong": torch.zeros(6, 10), "label": labels}, START)
        confidence = [max(math.exp(v) for v in row) / sum(math.exp(v) for v in row) for row in weak.tolist()]
        unlabelled = [value for value, label in zip(confidence, labels, strict=True) if label < 0]
        told.append(sum(unlabelled) / 4)
        assert found["confident"].item() == pytest.approx(sum(value >= 0.1 for value in unlabelled) / 4)
        assert threshold.item() == pytest.approx(0.1), "it moves after the step"
    objective.after_step(Progress(0, 20, 0, 1))  # a tenth of 20 steps is remembered: half of the way
    assert threshold.item() == pytest.approx((0.1 + sum(told) / 2) / 2, rel=1e-5)
    for _ in range(50):
        follow(threshold, torch.tensor(1.0), steps=20)
    assert threshold.item() == pytest.approx(0.95)
    before = threshold.clone()
    follow(before, torch.tensor(0.0), steps=10**6)
    assert before.item() == pytest.approx(0.95 * 0.999), "FreeMatch's memory in long runs"
    given: Any = made(digits, tmp_path, job(objective_params={"threshold": 0.8})).objective
    assert "threshold" not in given.state_dict()
