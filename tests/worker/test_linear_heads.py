"""Many heads at once are the heads that torch trains one by one; and the job that does it, from any start."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.parts import linear_heads
from worker.parts.linear_heads import Draw, Heads, train_heads
from worker.parts.seed import generator
from worker.report import Finished

pytestmark = pytest.mark.worker
CLASSES = 4


def blobs(rows: int = 200, dimension: int = 12) -> tuple[Tensor, Tensor]:
    draws = generator(0, "blobs")
    labels = torch.randint(CLASSES, (rows,), generator=draws)
    centres = torch.randn(CLASSES, dimension, generator=draws) * 2
    scales = torch.rand(dimension, generator=draws) * 10
    return (centres[labels] + torch.randn(rows, dimension, generator=draws) * 1.5) * scales + 5, labels


def one_by_one(
    features: Tensor, labels: Tensor, draw: Draw, rate: float, *, steps: int, batch_size: int, weight_decay: float
) -> nn.Linear:
    """The naive way: torch's layer, loss, gradient and optimiser."""
    x = (features - features.mean(0)) / features.std(0, correction=0)
    head = nn.Linear(x.shape[1], CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias], "weight_decay": 0.0}]
    )
    order, epoch = draw.rows[:0], 0
    for step in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, draw.rows[torch.randperm(
                len(draw.rows), generator=generator(draw.seed, "heads", epoch))]])  # fmt: skip
            epoch += 1
        rows, order = order[:batch_size], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2
        F.cross_entropy(head(x[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


HOW: dict[str, Any] = {"steps": 130, "batch_size": 24, "weight_decay": 0.1}


def test_all_at_once_equals_one_by_one() -> None:
    features, labels = blobs()
    draws = [Draw(torch.arange(200), 0), Draw(torch.arange(0, 200, 3), 1), Draw(torch.tensor([3, 7, 11, 50, 51]), 2)]
    rates = (0.001, 0.02, 0.3)
    heads = train_heads(features, labels, draws, rates, classes=CLASSES, **HOW)
    assert heads.weight.shape == (3, 3, CLASSES, 12)
    for number, draw in enumerate(draws):
        losses, accuracies = heads.loss_and_accuracy(number, features, labels)
        for column, rate in enumerate(rates):
            naive = one_by_one(features, labels, draw, rate, **HOW)
            torch.testing.assert_close(heads.weight[number, column], naive.weight.detach(), rtol=2e-3, atol=2e-4)
            torch.testing.assert_close(heads.bias[number, column], naive.bias.detach(), rtol=2e-3, atol=2e-4)
            logits = naive((features - features.mean(0)) / features.std(0, correction=0))
            assert losses[column].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-2)
            assert accuracies[column].item() == pytest.approx(
                (logits.argmax(1) == labels).float().mean().item(), abs=0.01
            )


def test_a_head_does_not_depend_on_those_beside_it() -> None:
    features, labels = blobs()
    draws = [Draw(torch.arange(0, 200, 2), 5), Draw(torch.arange(50), 6)]
    both = train_heads(features, labels, draws, (0.01, 0.1), classes=CLASSES, **HOW)
    alone = train_heads(features, labels, draws[1:], (0.1,), classes=CLASSES, **HOW)
    torch.testing.assert_close(both.weight[1, 1], alone.weight[0, 0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(both.weight[0, 1], both.weight[1, 1])


def test_a_constant_feature_and_one_label_do_no_harm() -> None:
    features, labels = blobs()
    features[:, 3] = 7.0
    heads: Heads = train_heads(features, labels, [Draw(torch.tensor([0]), 0)], (0.1,), classes=CLASSES, **HOW)
    assert bool(heads.weight.isfinite().all())
    assert int(heads.loss_and_accuracy(0, features[:1], labels[:1])[1]) == 1


def carried_out(digits: DatasetFacts, folder: Path, **given: Any) -> Finished:
    body = {"recipe": "linear_heads", "model": sets.NETWORK, **given}
    _, last = sets.finished(sets.order(body, digits, folder))
    return last


def test_the_job_gives_a_row_for_every_budget_and_seed(digits: DatasetFacts, tmp_path: Path) -> None:
    params = {"fractions": [0.2, 1.0], "seeds": 2, "steps": 60, "batch_size": 32}
    last = carried_out(digits, tmp_path, params=params)
    assert last.result is not None
    rows = last.result["rows"]
    assert [(row["label_fraction"], row["seed"]) for row in rows] == [(0.2, 0), (0.2, 1), (1.0, 0), (1.0, 1)]
    assert last.result["heads"] == 12
    assert all(row["labels"]["train"] + row["labels"]["validation"] in (30, 31, 32, 33, 34, 160) for row in rows)
    assert all(row["learning_rate"] in (0.003, 0.01, 0.03) for row in rows)
    assert rows[2]["test/accuracy"] > 0.5, "even random filters tell digits apart"
    assert rows[0]["test/accuracy"] < rows[2]["test/accuracy"]
    again = carried_out(digits, tmp_path / "again", params=params)
    assert again.result == last.result, "the same spec, the same numbers"
    few = carried_out(digits, tmp_path / "few", params={"labels_per_class": [1], "steps": 5})
    assert few.result is not None
    (row,) = few.result["rows"]
    assert (row["labels"], row["validation/accuracy"], row["learning_rate"]) == (
        {"train": 10, "validation": 0}, None, 0.01,
    )  # fmt: skip


def test_a_dataset_without_test_labels_is_refused(tmp_path: Path) -> None:
    pixels, labels = sets.digits()["test"]
    facts = sets.write_set(tmp_path / "set", {"train": (pixels, labels), "test": (pixels, labels * 0 - 1)})
    body = {"recipe": "linear_heads", "model": sets.NETWORK}
    _, last = sets.failed(sets.order(body, facts, tmp_path))
    assert last.error.code == "no_test_labels"


def test_a_step_is_one_pass_for_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = blobs(300, 16)
    draws = [Draw(torch.randperm(300, generator=generator(seed))[:count], seed)
             for seed in range(3) for count in (20, 100, 300)]  # fmt: skip
    passes: list[tuple[torch.Size, torch.Size]] = []

    def counted(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        passes.append((x.shape, weight.shape))
        return gradients(x, labels, weight, bias, classes)

    gradients = linear_heads._gradients
    monkeypatch.setattr(linear_heads, "_gradients", counted)
    train_heads(features, labels, draws, (0.003, 0.01, 0.03), classes=CLASSES, steps=7, batch_size=32, weight_decay=0.1)
    assert passes == [((9, 32, 16), (9, 16, 3 * CLASSES))] * 7  # 27 heads in 7 passes
