"""What linear layers read from a frozen network: a head per budget of labels, seed and learning rate, in one pass."""

from typing import Annotated, Any

import torch
from pydantic import Field

from app.domain.errors import DataFault
from app.domain.spec import Data
from worker.data.split import Labels, split_labels
from worker.parts.linear_heads import Draw, Heads, train_heads
from worker.recipe import Context, Params, Recipe, Requires, Result

Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]


class LinearHeadsParams(Params):
    """Which heads are trained."""

    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=16)] = Field(
        default=(1.0,), description="Parts of the training labels; a smaller part lies within a larger one."
    )
    labels_per_class: Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)] | None = Field(
        default=None, description="Labels of each class, in place of `fractions`."
    )
    seeds: int = Field(default=1, ge=1, le=50, description="Draws of the labels for each budget.")
    steps: int = Field(default=1000, ge=1, le=1_000_000, description="Optimiser steps of every head.")
    batch_size: int = Field(default=128, ge=1, le=65536, description="Samples per step and head.")
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=16)] = Field(
        default=(0.003, 0.01, 0.03),
        description="Peak rates to try; validation labels choose, and the middle one is taken where there are none.",
    )
    weight_decay: float = Field(default=0.05, ge=0, le=10, description="Of AdamW, on weights only.")
    validation_fraction: float = Field(default=0.1, ge=0, le=0.9, description="Of each budget's labels.")


def apply(context: Context) -> Result:
    """Train all heads from one computation of the features; one row of the result for each budget and seed."""
    params: LinearHeadsParams = context.params
    train, test = context.samples(["train"]), context.samples(["test"])
    if not bool((test.labels >= 0).any()):
        raise DataFault("The test split has no labels to measure the heads by.", code="no_test_labels")
    features, labels = context.features(train).to(context.device), train.labels.to(context.device)
    budgets = [
        (name, amount, number, _draw(train.labels, name, amount, context.seed + number, params))
        for name, amount in _amounts(params)
        for number in range(params.seeds)
    ]
    heads = train_heads(
        features, labels, [Draw(kept.train, context.seed + number) for _, _, number, kept in budgets],
        params.learning_rates, classes=len(context.info.classes), steps=params.steps, batch_size=params.batch_size,
        weight_decay=params.weight_decay, tick=lambda done, total: context.tick("heads", done, total),
    )  # fmt: skip
    known = test.labels >= 0
    asked = (context.features(test)[known].to(context.device), test.labels[known].to(context.device))
    rows: list[dict[str, Any]] = []
    for draw, (name, amount, number, kept) in enumerate(budgets):
        chosen, validation = _choose(heads, draw, features, labels, kept.validation)
        accuracies = heads.loss_and_accuracy(draw, *asked)[1]
        rows.append({
            name: amount, "seed": number, "labels": {"train": len(kept.train), "validation": len(kept.validation)},
            "learning_rate": params.learning_rates[chosen], "validation/accuracy": validation,
            "test/accuracy": accuracies[chosen].item(),
        })  # fmt: skip
    return Result(
        {"rows": rows, "heads": len(budgets) * len(params.learning_rates), "steps": params.steps},
        metrics={"test/accuracy": rows[-1]["test/accuracy"]},
    )


def _amounts(params: LinearHeadsParams) -> list[tuple[str, float]]:
    if params.labels_per_class is not None:
        return [("labels_per_class", count) for count in params.labels_per_class]
    return [("label_fraction", fraction) for fraction in params.fractions]


def _draw(labels: torch.Tensor, name: str, amount: float, seed: int, params: LinearHeadsParams) -> Labels:
    budget = Data.model_validate({name: amount, "validation_fraction": params.validation_fraction})
    return split_labels(labels, budget, seed=seed, validate=True)


def _choose(
    heads: Heads, draw: int, features: torch.Tensor, labels: torch.Tensor, validation: torch.Tensor
) -> tuple[int, float | None]:
    """Give the learning rate with the least loss on the validation labels, and its accuracy there."""
    if not len(validation):
        return len(heads.weight[draw]) // 2, None
    rows = validation.to(features.device)
    losses, accuracies = heads.loss_and_accuracy(draw, features[rows], labels[rows])
    best = int(losses.argmin())
    return best, accuracies[best].item()


RECIPE = Recipe(
    name="linear_heads",
    kind="apply",
    version="1",
    summary="Measure what linear classifiers read from a frozen network: label budgets, seeds and rates in one pass.",
    tasks=("image_classification",),
    Params=LinearHeadsParams,
    requires=Requires(labels=True, test_labels=True, min_classes=2),
    apply=apply,
)
