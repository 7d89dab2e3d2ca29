import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from worker.parts import metrics

pytestmark = pytest.mark.worker


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (200,), generator=generator)
    logits = torch.randn(200, 7, generator=generator) + 1.5 * F.one_hot(labels, 7)
    return logits, labels


@pytest.fixture(scope="module")
def digits():
    found: Any = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32).flatten(1)
    labels = torch.tensor(found.target)
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def calibration_error(logits, labels, bins):
    confidence, predicted = logits.softmax(1).max(1)
    total = 0.0
    for low in range(bins):
        inside = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if inside.any():
            accuracy = (predicted[inside] == labels[inside]).float().mean()
            total += (accuracy - confidence[inside].mean()).abs().item() * inside.float().mean().item()
    return total


def test_classification_agrees_with_scikit_learn(scored):
    logits, labels = scored
    found = metrics.classification(logits, labels)
    predicted = logits.argmax(1)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="macro")
    expected = {
        "accuracy": (predicted == labels).double().mean().item(),
        "top5_accuracy": top_k_accuracy_score(labels, logits.numpy(), k=5),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "loss": F.cross_entropy(logits, labels).item(),
        "expected_calibration_error": calibration_error(logits, labels, metrics.CALIBRATION_BINS),
    }
    assert found == pytest.approx(expected, abs=1e-5)


def test_top5_needs_more_than_five_classes():
    assert "top5_accuracy" not in metrics.classification(torch.randn(9, 5), torch.arange(9) % 5)


def test_unlabelled_rows_are_left_out(scored):
    logits, labels = scored
    more = torch.cat([logits, torch.randn(20, 7)]), torch.cat([labels, torch.full((20,), -1)])
    assert metrics.classification(*more) == metrics.classification(logits, labels)


def test_per_class_agrees_with_scikit_learn(scored):
    logits, labels = scored
    names = tuple("abcdefg")
    found = metrics.per_class(logits, labels, names)
    found_by_them: Any = precision_recall_fscore_support(labels, logits.argmax(1))
    precision, recall, f1, support = found_by_them
    assert found["confusion_matrix"] == confusion_matrix(labels, logits.argmax(1)).tolist()
    for number, name in enumerate(names):
        row = found["classes"][name]
        assert row["samples"] == support[number]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(
            [precision[number], recall[number], f1[number]], abs=1e-5
        )


def test_knn_is_the_naive_vote(digits):
    bank, bank_labels, queries, labels = digits
    correct = 0
    for query, label in zip(F.normalize(queries[:100], dim=1), labels[:100], strict=True):
        similarity = F.normalize(bank, dim=1) @ query
        votes = [0.0] * 10
        for neighbour in similarity.argsort(descending=True)[:20]:
            votes[bank_labels[neighbour]] += math.exp(similarity[neighbour] / 0.07)
        correct += int(np.argmax(votes)) == label
    assert metrics.knn_accuracy(bank, bank_labels, queries[:100], labels[:100]) == pytest.approx(correct / 100)


def test_one_neighbour_is_scikit_learns(digits):
    bank, bank_labels, queries, labels = digits
    model = KNeighborsClassifier(1).fit(F.normalize(bank, dim=1), bank_labels)
    expected = model.score(F.normalize(queries, dim=1).numpy(), labels)
    assert metrics.knn_accuracy(bank, bank_labels, queries, labels, k=1) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("width", [8, 90], ids=["fewer features than rows", "more features than rows"])
@pytest.mark.parametrize("fitted", [metrics.FITTED, 400], ids=["at once", "in pieces"])
def test_linear_probe_is_ridge_with_the_penalty_of_the_best_left_out_accuracy(width, fitted, monkeypatch):
    monkeypatch.setattr(metrics, "FITTED", fitted)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    means = torch.randn(3, width, generator=generator)
    features, queries = (means[labels] + (0.15 * width) * torch.randn(60, width, generator=generator) for _ in range(2))
    mean, scale = features.mean(0), features.std(0)
    x, asked = (((rows - mean) / scale).double().numpy() for rows in (features, queries))
    y = np.eye(3)[labels]

    def scores(rows, targets, penalty, wanted):
        centre, level = rows.mean(0), targets.mean(0)
        gram = (rows - centre).T @ (rows - centre) + penalty * np.eye(width)
        return (wanted - centre) @ np.linalg.solve(gram, (rows - centre).T @ (targets - level)) + level

    best = (-1.0, 0.0)
    for penalty in np.logspace(-4, 2, 20) * 60:
        left_out = [scores(np.delete(x, i, 0), np.delete(y, i, 0), penalty, x[i]).argmax() for i in range(60)]
        accuracy = (np.array(left_out) == labels.numpy()).mean()
        if accuracy >= best[0]:
            best = accuracy, (scores(x, y, penalty, asked).argmax(1) == labels.numpy()).mean()
    assert metrics.linear_probe_accuracy(features, labels, queries, labels) == pytest.approx(best[1])


def test_linear_probe_reads_digits(digits):
    assert metrics.linear_probe_accuracy(*digits) == pytest.approx(0.888, abs=0.01)


def test_a_probe_of_noise_is_chance():
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(400, 300, generator=generator), torch.randn(400, 300, generator=generator)
    labels = torch.arange(400) % 4
    assert metrics.linear_probe_accuracy(features, labels, queries, labels) < 0.4


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    assert metrics.effective_rank(basis[:, :10] @ torch.eye(10, 32)) == pytest.approx(10, rel=0.01)
    assert metrics.effective_rank(torch.ones(50, 16)) == pytest.approx(1, abs=0.01)
    values = torch.tensor([4.0, 2.0, 1.0])
    share = values / 7
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist()))
    assert metrics.effective_rank(torch.diag(values)) == pytest.approx(expected, rel=1e-3)


def test_spread_is_one_when_isotropic_and_zero_when_collapsed():
    generator = torch.Generator().manual_seed(0)
    assert metrics.feature_spread(torch.randn(5000, 32, generator=generator)) == pytest.approx(1, abs=0.02)
    collapsed = torch.ones(100, 32) + 1e-4 * torch.randn(100, 32, generator=generator)
    assert metrics.feature_spread(collapsed) < 1e-3


def test_alignment_and_uniformity_are_those_of_the_paper():
    draws = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40, 8, generator=draws)
    first_unit, second_unit = (x / x.norm(dim=1, keepdim=True) for x in (first, second))
    apart = [float((a - b) @ (a - b)) for a, b in zip(first_unit, second_unit, strict=True)]
    assert metrics.alignment(first, second) == pytest.approx(sum(apart) / len(apart), rel=1e-5)
    assert metrics.alignment(first, 3 * first) == pytest.approx(0, abs=1e-6)
    pairs = [(a, b) for i, a in enumerate(first_unit) for b in first_unit[i + 1 :]]
    potential = sum(math.exp(-2 * float((a - b) @ (a - b))) for a, b in pairs) / len(pairs)
    assert metrics.uniformity(first) == pytest.approx(math.log(potential), rel=1e-4)
    assert metrics.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)
