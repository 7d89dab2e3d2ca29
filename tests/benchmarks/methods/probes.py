"""What k-NN and a linear layer read from a backbone: of the test split, by the functions that every job reports."""

import statistics
from typing import Any

import torch
from torch import nn

from app.domain.spec import Data as Budget
from tests.benchmarks.pairs import Numbers
from worker import evaluate
from worker.data.source import Data, in_order
from worker.data.split import split_labels
from worker.parts import compute, metrics
from worker.trainer.assembly import Assembly

DRAWS = 5  # of the labelled samples, where there are only some
SETTLING_BATCH = 500


def read_off(backbone: nn.Module, made: Assembly, *, labels_per_class: int | None, seed: int) -> Numbers:
    """Ask for the labels of the test split after those of the training split, all or some, were seen.

    A seed draws the same labelled samples for every backbone.
    """
    assert made.data.test is not None
    plan = made.plan.model_copy(update={"precision": "float32"})
    compute.settle(plan)
    compute.place(backbone, plan, made.device)
    bank, queries = (
        evaluate.features(backbone, split, made.data, plan, made.device, lambda *_: None)
        for split in (made.data.train, made.data.test)
    )
    device, known, asked = made.device, made.data.train.labels, made.data.test.labels
    rows = [torch.arange(len(known))]
    if labels_per_class is not None:
        budget = Budget(labels_per_class=labels_per_class)
        draws = range(seed * DRAWS, (seed + 1) * DRAWS)
        rows = [split_labels(known, budget, seed=draw, validate=False).train for draw in draws]
    shown = [(bank[each.to(device)], known[each].to(device), queries, asked.to(device)) for each in rows]
    return {
        "knn": statistics.fmean(metrics.knn_accuracy(*each) for each in shown),
        "linear": statistics.fmean(metrics.linear_probe_accuracy(*each) for each in shown),
        "effective_rank": metrics.effective_rank(queries), "feature_spread": metrics.feature_spread(queries),
    }  # fmt: skip


def settle_norms(backbone: nn.Module, data: Data, device: torch.device) -> None:
    """Give batch norm the statistics of the training images in place of its start."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
            module.reset_running_stats()
    trained: Any = backbone.train()
    with torch.no_grad():
        for rows in in_order(data.train, SETTLING_BATCH):
            trained(data.ready({"image": data.train.batch(rows)["image"]}, device)["image"])
    backbone.eval()
