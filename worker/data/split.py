"""Which labels a run may see: a seeded, stratified budget, with the validation labels inside it. Pure."""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.errors import UserFault
from app.domain.spec import Data
from worker.parts.seed import generator


@dataclass(frozen=True)
class Labels:
    """Rows of the training split, int64, ascending: labels to train on, to validate on, and the rows without either."""

    train: Tensor
    validation: Tensor
    unlabelled: Tensor


def split_labels(labels: Tensor, data: Data, *, seed: int, validate: bool) -> Labels:
    """Keep labels for a part of the rows and set some of those apart for validation.

    For one seed a smaller budget is a subset of a larger one. A class that has labels keeps at least one, and keeps at
    least one for training.

    Args:
        labels: int64 [rows], -1 where there is none.
        validate: whether validation labels are wanted from here (the dataset brings no validation split).

    Raises:
        UserFault: no label is left to train on.
    """
    train: list[Tensor] = []
    validation: list[Tensor] = []
    for number in torch.unique(labels[labels >= 0]).tolist():
        rows = (labels == number).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator(seed, "labels", number))]
        kept = rows[: _budget(len(rows), data)]
        # Half-way cases round up, so that five labels at a tenth still validate on none and ten on one.
        held = min(int(len(kept) * data.validation_fraction + 0.5), len(kept) - 1) if validate else 0
        train.append(kept[: len(kept) - held])
        validation.append(kept[len(kept) - held :])
    if not train:
        raise UserFault("No training sample has a label.", code="no_labels", hint="Use a dataset with class folders.")
    kept_rows = torch.cat([*train, *validation])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[kept_rows] = False
    return Labels(torch.cat(train).sort()[0], torch.cat(validation).sort()[0], rest.nonzero().squeeze(1))


def reduced(data: Data) -> bool:
    """Say whether there is a budget below all labels."""
    return data.label_fraction < 1 or data.labels_per_class is not None


def _budget(available: int, data: Data) -> int:
    if data.labels_per_class is not None:
        return min(data.labels_per_class, available)
    return min(max(1, int(available * data.label_fraction + 0.5)), available)
