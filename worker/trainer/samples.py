"""Which samples a run trains on, validates with, is tested by and probed with."""

from collections.abc import Callable

import torch
from torch import Tensor

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault
from app.domain.spec import Spec
from worker import evaluate
from worker.data.images import Images, Streamed
from worker.data.source import Data, Source, part
from worker.data.split import reduced, split_labels
from worker.recipe import Recipe


def choose_samples(
    recipe: Recipe, spec: Spec, facts: DatasetFacts, train: Images | Streamed,
    images: Callable[[str], Images | Streamed], mean: tuple[float, ...], std: tuple[float, ...], seed: int,
) -> Data:  # fmt: skip
    """Part the training images, and open with `images` the other splits that the run looks at.

    Raises:
        DataFault: there are too few samples, or no unlabelled ones where the recipe needs some.
    """
    brings_validation = facts.splits.get("validation", 0) > 0
    probe = None
    if recipe.requires.labels:
        # Under a budget the validation labels come out of it, even where the dataset brings more of them.
        uses_split = brings_validation and facts.labelled.get("validation", 0) > 0 and not reduced(spec.data)
        labels = split_labels(train.labels, spec.data, seed=seed, validate=not uses_split)
        rows, hidden = labels.train, None
        if recipe.requires.unlabelled:
            if not len(labels.unlabelled):
                raise DataFault(
                    f"{recipe.name} needs unlabelled training samples, and every one here has a label.",
                    code="no_unlabelled_samples", hint="Add some, or hide labels with data.labels_per_class.",
                )  # fmt: skip
            hidden = torch.ones(len(train), dtype=torch.bool)
            hidden[labels.train] = False
            rows = torch.cat([labels.train, labels.unlabelled]).sort()[0]
        training = part(train, rows, hidden=hidden)
        validation = _labelled(images("validation")) if uses_split else None
        if not uses_split and len(labels.validation):
            validation = part(train, labels.validation)
    else:
        training = _whole(train)
        validation = _whole(images("validation")) if brings_validation else None
    if recipe.kind == "pretrain":
        probe = part(train, evaluate.probe_rows(len(train), seed))
    if len(training) < recipe.requires.min_samples:
        raise DataFault(
            f"{recipe.name} needs at least {recipe.requires.min_samples} training samples; {len(training)} are usable.",
            code="too_few_samples",
        )
    tested = recipe.requires.labels and facts.splits.get("test", 0) and facts.labelled.get("test", 0)
    test = _labelled(images("test")) if tested else None
    return Data(training, validation, test, None, torch.tensor(mean), torch.tensor(std), probe)


def class_counts(labels: Tensor, classes: int) -> tuple[int, ...]:
    """Count the labels of each class; -1 is none."""
    return tuple(torch.bincount(labels[labels >= 0], minlength=classes).tolist())


def _whole(source: Source) -> Source:
    return part(source, torch.arange(len(source)))


def _labelled(source: Source) -> Source:
    return part(source, (source.labels >= 0).nonzero().squeeze(1))
