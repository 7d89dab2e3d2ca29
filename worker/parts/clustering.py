"""How well clusters agree with classes, or with other clusters: all from one table of how often each pair occurs."""

import torch
from torch import Tensor


def agreement(assignment: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare clusters with classes, each int64 [n]; rows labelled -1 are left out, and one row must be left.

    Returns:
        purity, nmi, adjusted_rand and matched_accuracy, each 1 where clusters and classes are the same.
    """
    known = labels >= 0
    table = contingency(assignment[known], labels[known])
    return {
        "purity": purity(table),
        "nmi": normalised_mutual_information(table),
        "adjusted_rand": adjusted_rand(table),
        "matched_accuracy": matched_accuracy(table),
    }


def contingency(first: Tensor, second: Tensor) -> Tensor:
    """Count how often each pair occurs: float64 [values of `first`, values of `second`] on the CPU."""
    pairs = torch.stack([first, second]).cpu()
    rows, columns = (pairs.amax(1) + 1).tolist()
    return torch.bincount(pairs[0] * columns + pairs[1], minlength=rows * columns).view(rows, columns).double()


def purity(table: Tensor) -> float:
    """Give the part of the samples that belong to the commonest class of their cluster (the rows of the table)."""
    return (table.amax(1).sum() / table.sum()).item()


def normalised_mutual_information(table: Tensor) -> float:
    """Give the mutual information over the mean of both entropies (scikit-learn's arithmetic mean); 1 where both are 0.

    Independent clusters give more than 0, the more so the more and the smaller they are.
    """
    joint = table / table.sum()
    rows, columns = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    mean = (rows + columns) / 2
    return 1.0 if mean == 0 else max(0.0, (rows + columns - _entropy(joint.flatten())) / mean)


def adjusted_rand(table: Tensor) -> float:
    """Give the adjusted Rand index (Hubert, Arabie: Comparing Partitions, 1985, equation 5): 0 for independent ones."""

    def pairs(counts: Tensor) -> float:
        return (counts * (counts - 1) / 2).sum().item()

    total = pairs(table.sum())
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected, most = rows * columns / max(total, 1.0), (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def matched_accuracy(table: Tensor) -> float:
    """Give the accuracy of the best one-to-one naming of clusters by classes (Kuhn: The Hungarian Method, 1955)."""
    from scipy.optimize import linear_sum_assignment  # a third of a second that most jobs need not spend

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return (table[torch.from_numpy(rows), torch.from_numpy(columns)].sum() / table.sum()).item()


def _entropy(shares: Tensor) -> float:
    shares = shares[shares > 0]
    return -(shares * shares.log()).sum().item()
