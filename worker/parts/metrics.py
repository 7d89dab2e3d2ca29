"""Every number that is not a running mean: how good a classifier is, and how good features are."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchmetrics warns at import about extras that nobody here uses
    from torchmetrics.functional import classification as measures

FITTED = 2**22  # of rows x penalties x classes at once: 32 MB, and a few times that
CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599
# Under these a representation tells its samples hardly apart: RankMe is 1 and the spread 0 for one single point.
RANK_FLOOR = 1.2
SPREAD_FLOOR = 0.02


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure logits `[n, classes]` against labels `[n]`; rows labelled -1 are left out.

    Returns:
        accuracy, top5_accuracy (with more than five classes), macro precision, recall and f1,
        expected_calibration_error, loss (cross entropy).
    """
    logits, labels = _labelled(logits, labels)
    classes = logits.shape[1]
    probabilities = logits.softmax(1)
    found = {
        "accuracy": measures.multiclass_accuracy(probabilities, labels, classes, average="micro"),
        "precision": measures.multiclass_precision(probabilities, labels, classes, average="macro"),
        "recall": measures.multiclass_recall(probabilities, labels, classes, average="macro"),
        "f1": measures.multiclass_f1_score(probabilities, labels, classes, average="macro"),
        "expected_calibration_error": measures.multiclass_calibration_error(
            probabilities, labels, classes, n_bins=CALIBRATION_BINS, norm="l1"
        ),
        "loss": F.cross_entropy(logits, labels),
    }
    if classes > 5:
        found["top5_accuracy"] = measures.multiclass_accuracy(probabilities, labels, classes, average="micro", top_k=5)
    return {name: value.item() for name, value in found.items()}


def per_class(logits: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Give `{"classes": {name: {precision, recall, f1, samples}}, "confusion_matrix": rows of true classes}`."""
    logits, labels = _labelled(logits, labels)
    count = len(names)
    predicted = logits.argmax(1)
    precision = measures.multiclass_precision(predicted, labels, count, average="none")
    recall = measures.multiclass_recall(predicted, labels, count, average="none")
    f1 = measures.multiclass_f1_score(predicted, labels, count, average="none")
    confusion = measures.multiclass_confusion_matrix(predicted, labels, count)
    return {
        "classes": {
            name: {
                "precision": precision[number].item(),
                "recall": recall[number].item(),
                "f1": f1[number].item(),
                "samples": int(confusion[number].sum()),
            }
            for number, name in enumerate(names)
        },
        "confusion_matrix": confusion.tolist(),
    }


def _labelled(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    known = labels >= 0
    return values[known].float(), labels[known]


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Classify `queries [m, d]` by their k most similar features in `bank [n, d]`, and give the accuracy.

    Cosine similarity, votes weighted by exp(similarity / temperature): Wu et al., arXiv 1805.01978, section 3.4. Rows
    labelled -1 are left out on both sides.
    """
    bank, bank_labels = _labelled(bank, bank_labels)
    queries, labels = _labelled(queries, labels)
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank, dim=1)
    correct = 0
    for part, truth in zip(F.normalize(queries, dim=1).split(1024), labels.split(1024), strict=True):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [rows, k]
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(labels)


def linear_probe_accuracy(
    features: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, *, penalties: int = 20
) -> float:
    """Fit a linear classifier on `features [n, d]` by ridge regression and give its accuracy on `queries [m, d]`.

    All penalties come from one eigendecomposition; the best by leave-one-out accuracy on the training rows is taken
    (the closed form for ridge: residual / (1 - leverage)), so the queries choose nothing.
    """
    features, labels = _labelled(features, labels)
    queries, query_labels = _labelled(queries, query_labels)
    classes = int(labels.max()) + 1
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    x = ((features - mean) / scale).double()
    targets = F.one_hot(labels, classes).double()
    centre = targets.mean(0)
    # The smaller of both products has the same eigenvalues but for zeros; e is min(n, d).
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values = values.clamp(min=0)
    rotated = vectors * values.sqrt() if wide else x @ vectors  # [n, e]
    moments = rotated.T @ (targets - centre)  # [e, classes]
    shrunk = 1 / (values + torch.logspace(-4, 2, penalties, dtype=torch.float64, device=x.device)[:, None] * len(x))
    leverage = (rotated.square() @ shrunk.T + 1 / len(x)).clamp(max=1 - 1e-9)  # [n, penalties]
    accuracies: list[float] = []
    for some in torch.arange(penalties, device=x.device).split(max(1, FITTED // targets.numel())):
        fitted = (rotated @ (shrunk[some, :, None] * moments).transpose(0, 1).flatten(1)).unflatten(1, (-1, classes))
        left_out = targets[:, None] - (targets[:, None] - fitted - centre) / (1 - leverage[:, some, None])
        accuracies += (left_out.argmax(2) == labels[:, None]).double().mean(0).tolist()
    best = shrunk[max(range(penalties), key=lambda number: (accuracies[number], number)), :, None]
    if wide:
        weight = x.T @ (vectors @ (best * (vectors.T @ (targets - centre))))
    else:
        weight = vectors @ (best * moments)
    scores = ((queries - mean) / scale).double() @ weight + centre
    return (scores.argmax(1) == query_labels).double().mean().item()


def effective_rank(features: Tensor) -> float:
    """Give RankMe of features `[n, d]`: the exponential of the entropy of their singular values.

    Garrido et al., arXiv 2210.02885, equation 1. Between 1 (collapsed) and min(n, d).
    """
    # From the smaller of both products, in float64 as exact as by the decomposition in float32, which takes longer.
    x = features.double()
    values = torch.linalg.eigvalsh(x @ x.T if x.shape[1] > len(x) else x.T @ x).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    return (-(share * share.log()).sum()).exp().item()


def alignment(first: Tensor, second: Tensor) -> float:
    """Give the mean squared distance of the normalised features `[n, d]` of two views: 0 where views are told alike.

    Wang and Isola, arXiv 2005.10242, equation for L_align with alpha = 2.
    """
    return (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean().item()


def uniformity(features: Tensor) -> float:
    """Give the log of the mean Gaussian potential of pairs of normalised features `[n, d]`: lower is more even.

    Wang and Isola, arXiv 2005.10242, equation for L_uniform with t = 2. 0 for one single point; features spread evenly
    over a sphere of many dimensions come to -4.
    """
    distances = torch.pdist(F.normalize(features, dim=1))  # [n * (n - 1) / 2]
    return (-2 * distances.square()).exp().mean().log().item()


def feature_spread(features: Tensor) -> float:
    """Give the spread of normalised features `[n, d]`: 0 when they have collapsed to a point, 1 when isotropic.

    The mean over dimensions of the standard deviation, times the root of d (Chen and He, arXiv 2011.10566, 4.1).
    """
    normalised = F.normalize(features.float(), dim=1)
    return (normalised.std(0, correction=0).mean() * features.shape[1] ** 0.5).item()


def collapsed(numbers: Mapping[str, float]) -> bool:
    """Say whether a probe found a representation that tells its samples hardly apart."""
    return numbers["effective_rank"] < RANK_FLOOR or numbers["feature_spread"] < SPREAD_FLOOR


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Give the Frechet distance between Gaussians fitted to features `[n, d]` and `[m, d]`.

    Heusel et al., arXiv 1706.08500, equation 6: the squared distance of the means, plus
    tr(A + B - 2 (A B)^(1/2)) of the covariances. Of few samples it is too large on average.
    """
    one, other = one.double().cpu(), other.double().cpu()
    first, second = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * shared
    return max(0.0, distance.item())
