"""Many linear classifiers on the same features, trained in one pass: every budget of labels, seed and learning rate.

Heads differ in the rows they may see and in their learning rate, not in their mathematics, so their weights are one
tensor `[draws, dimension, rates * classes]`: a step is one gather, two batched products and one update for all of them.
Softmax regression is convex, so weights begin at zero and a seed decides only labels and order. The gradient of the
cross entropy, `x^T (softmax - one-hot) / batch`, is written out. AdamW as in Loshchilov and Hutter, arXiv 1711.05101,
algorithm 2; biases are not decayed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.parts import schedule
from worker.parts.seed import generator

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 64  # steps whose rows are drawn at once


@dataclass(frozen=True)
class Draw:
    """The labels that a head may see: rows of the features, and the seed of their order."""

    rows: Tensor  # int64 [n]
    seed: int


@dataclass(frozen=True)
class Heads:
    """Trained heads, one for each draw and learning rate."""

    weight: Tensor  # float32 [draws, rates, classes, dimension], for standardised features
    bias: Tensor  # float32 [draws, rates, classes]
    mean: Tensor  # [dimension]
    scale: Tensor

    def loss_and_accuracy(self, draw: int, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Give cross entropy and accuracy, each [rates], of a draw's heads on features `[n, dimension]`."""
        x = (features - self.mean) / self.scale
        logits = torch.einsum("nd,rcd->nrc", x, self.weight[draw]) + self.bias[draw]
        losses = F.cross_entropy(logits.permute(0, 2, 1), labels[:, None].expand(-1, logits.shape[1]), reduction="none")
        return losses.mean(0), (logits.argmax(2) == labels[:, None]).float().mean(0)


def train_heads(
    features: Tensor, labels: Tensor, draws: Sequence[Draw], rates: Sequence[float], *, classes: int, steps: int,
    batch_size: int, weight_decay: float, tick: Callable[[int, int], None] = lambda _done, _total: None,
) -> Heads:  # fmt: skip
    """Train a head for each draw and learning rate on features `[n, dimension]` with labels int64 `[n]`.

    All take the same number of steps of the same size, with a cosine schedule; a draw of fewer rows than a batch goes
    through them more than once in a step. Features are standardised over all rows: that needs no label.
    """
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    x = (features - mean) / scale
    device, (n_draws, n_rates) = x.device, (len(draws), len(rates))
    weight = torch.zeros(n_draws, x.shape[1], n_rates * classes, device=device)
    bias = torch.zeros(n_draws, 1, n_rates * classes, device=device)
    parameters, decays = (weight, bias), (weight_decay, 0.0)
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    rate = torch.tensor(rates, device=device).repeat_interleave(classes)  # [rates * classes]
    orders = [_Order(draw) for draw in draws]
    for start in range(0, steps, CHUNK):
        count = min(CHUNK, steps - start)
        rows = torch.stack([order.take(count * batch_size) for order in orders]).to(device)
        for step in range(start, start + count):
            now = rows[:, (step - start) * batch_size : (step - start + 1) * batch_size]  # [draws, batch]
            gradients = _gradients(x[now], labels[now], weight, bias, classes)
            scheduled = rate * schedule.scale("cosine", (step + 0.5) / steps)
            for p, g, m, v, decay in zip(parameters, gradients, first, second, decays, strict=True):
                p.mul_(1 - scheduled * decay)
                m.lerp_(g, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                slope = v.sqrt().div_((1 - BETAS[1] ** (step + 1)) ** 0.5).add_(EPSILON)
                p.sub_(m / slope * (scheduled / (1 - BETAS[0] ** (step + 1))))
        tick(start + count, steps)
    shape = (n_draws, n_rates, classes)
    return Heads(weight.transpose(1, 2).reshape(*shape, -1), bias.view(shape), mean, scale)


def _gradients(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Give the gradients for a batch `[draws, batch, dimension]` with labels `[draws, batch]`."""
    logits = torch.baddbmm(bias, x, weight)  # [draws, batch, rates * classes]
    by_rate = logits.view(*labels.shape, -1, classes)
    errors = by_rate.softmax(3) - F.one_hot(labels, classes)[:, :, None]
    errors = errors.view_as(logits) / labels.shape[1]
    return x.transpose(1, 2) @ errors, errors.sum(1, keepdim=True)


class _Order:
    """The rows of a draw, shuffled anew each time they are through."""

    def __init__(self, draw: Draw) -> None:
        self._rows, self._seed, self._epoch = draw.rows.cpu(), draw.seed, 0
        self._left = self._rows[:0]

    def take(self, count: int) -> Tensor:
        parts = [self._left]
        have = len(self._left)
        while have < count:
            shuffle = torch.randperm(len(self._rows), generator=generator(self._seed, "heads", self._epoch))
            parts.append(self._rows[shuffle])
            have, self._epoch = have + len(self._rows), self._epoch + 1
        everything = torch.cat(parts)
        self._left = everything[count:]
        return everything[:count]
