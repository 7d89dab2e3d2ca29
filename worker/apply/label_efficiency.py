"""Does pretraining pay? The same fine-tuning from a random start and from a given model, over budgets of labels.

Every cell trains for the same number of optimiser steps (`training.steps`) whatever its labels: an epoch of 1 % of the
labels is a few steps, so equal epochs would be unequal budgets. Nothing stops early, the last weights count, and the
validation labels come out of the budget. Both starts of a seed see the same labels, so their difference is a pair; what
is said of a budget is the mean of these differences, with their standard deviation over seeds.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from app.domain.errors import DataFault, UserFault
from app.domain.inner_jobs import Part
from app.domain.spec import Architecture, Spec
from worker.parts import chart
from worker.recipe import Child, Facts, Gathered, Params, Recipe, Requires

STARTS = ("random", "model")
HEADS_ONLY = {"trainable": "head"}
HEAD_STEPS = 1000  # of linear heads, where the job counts epochs
WITHOUT = {
    "training.early_stopping": "cells are compared after the same number of steps",
    "training.max_seconds": "cells are compared after the same number of steps",
    "data.label_fraction": "the budgets of labels are params.fractions or params.labels_per_class",
    "data.labels_per_class": "the budgets of labels are params.fractions or params.labels_per_class",
}
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class LabelEfficiencyParams(Params):
    """Which cells are compared."""

    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=8)] = Field(
        default=(0.01, 0.1, 1.0), description="Parts of the training labels; each class keeps one label at least."
    )
    labels_per_class: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] | None = Field(
        default=None, description="Labels of each class, in place of `fractions`."
    )
    seeds: int = Field(default=3, ge=1, le=20, description="Runs of every cell: labels, order and new weights differ.")
    finetune: dict[str, Any] = Field(
        default={},
        description='`params` of image_classification. With {"trainable": "head"} alone, all linear heads of a start '
        "are trained together in one job, by AdamW: of `training`, only steps, seed, learning_rate, weight_decay and "
        "batch_size count.",
        json_schema_extra=Part(recipe="image_classification").keyword(),
    )

    @property
    def amounts(self) -> tuple[float, ...]:
        """The budgets, smallest first."""
        return tuple(sorted(set(self.fractions if self.labels_per_class is None else self.labels_per_class)))

    @property
    def unit(self) -> str:
        """The field of a job's `data` that holds a budget."""
        return "label_fraction" if self.labels_per_class is None else "labels_per_class"

    def words(self, amount: float) -> str:
        """Name a budget in a sentence."""
        if self.unit == "labels_per_class":
            return f"{amount} label{'s' if amount > 1 else ''} per class"
        return "all labels" if amount == 1 else f"{amount * 100:.3g} % of the labels"


@dataclass(frozen=True)
class Cell:
    """One run: a start, a budget and a seed, or all heads of a start."""

    start: str
    amount: float
    seed: int
    unit: str

    @property
    def key(self) -> str:
        """The key of its job."""
        amount = f"{self.amount * 100:.6g}pc" if self.unit == "label_fraction" else f"{self.amount}each"
        return f"{self.start}-{amount}-{self.seed}"


def cells(params: LabelEfficiencyParams) -> list[Cell]:
    """Give every cell; those of one seed come together, so that a job that is ended early has whole comparisons."""
    return [
        Cell(start, amount, seed, params.unit)
        for seed in range(params.seeds)
        for amount in params.amounts
        for start in STARTS
    ]


def plan(params: LabelEfficiencyParams, facts: Facts, finished: Sequence[Child]) -> list[dict[str, Any]]:  # noqa: ARG001
    """One job for every cell, or for all heads of a start; they do not depend on each other."""
    starts: dict[str, Any] = dict(zip(STARTS, _starts(facts), strict=True))
    _refuse_unfair(facts)
    training = facts.spec.training.model_dump(mode="json", exclude_defaults=True)
    validation = facts.spec.data.validation_fraction
    if params.finetune == HEADS_ONLY:
        return [
            {
                "child_key": f"{start}-heads", "recipe": "linear_heads", "model": model,
                "params": _heads(params, facts), "training": {"seed": facts.spec.training.seed},
            }
            for start, model in starts.items()
        ]  # fmt: skip
    return [
        {
            "child_key": cell.key, "recipe": "image_classification", "model": starts[cell.start],
            "params": params.finetune, "training": {**training, "seed": facts.spec.training.seed + cell.seed},
            "data": {cell.unit: cell.amount, "validation_fraction": validation},
        }
        for cell in cells(params)
    ]  # fmt: skip


def _starts(facts: Facts) -> tuple[Any, Any]:
    """Give the random start and the given one: the same network without and with what it has learned."""
    if facts.config is not None:
        untrained = {**facts.config.architecture, "image_size": facts.config.image_size, "weights": None}
        return untrained, facts.model
    if isinstance(facts.spec.model, Architecture) and facts.spec.model.weights is not None:
        given = facts.spec.model.model_dump(mode="json")
        return {**given, "weights": None}, given
    raise UserFault(
        "model: give the pretrained model to compare with a random start: `mdl_…`, a job `job_…`, or an architecture "
        "with `weights`.", code="untrained_model", phase="plan",
    )  # fmt: skip


def _refuse_unfair(facts: Facts) -> None:
    spec = facts.spec
    if facts.dataset is not None and not facts.dataset.labelled.get("test"):
        raise DataFault(
            "The test split has no labels to compare by.", code="no_test_labels", phase="plan",
            hint="Use a dataset with a labelled `test` folder.",
        )  # fmt: skip
    body = spec.model_dump()
    for field, why in WITHOUT.items():
        section, name = field.split(".")
        if body[section][name] != Spec.model_fields[section].default.model_dump()[name]:
            raise UserFault(f"{field}: {why}; leave this out.", phase="plan")


def _heads(params: LabelEfficiencyParams, facts: Facts) -> dict[str, Any]:
    """Say to `linear_heads` what the job says to fine-tuning."""
    training = facts.spec.training
    wanted: dict[str, Any] = {
        "seeds": params.seeds, "steps": training.steps or HEAD_STEPS, "weight_decay": training.weight_decay,
        "validation_fraction": facts.spec.data.validation_fraction,
        "fractions" if params.unit == "label_fraction" else params.unit: list(params.amounts),
    }  # fmt: skip
    if training.learning_rate != "auto":
        wanted["learning_rates"] = [training.learning_rate]
    if training.batch_size != "auto":
        wanted["batch_size"] = training.batch_size
    return wanted


def gather(params: LabelEfficiencyParams, facts: Facts, children: Sequence[Child]) -> Gathered:
    """Put the cells into a table, a chart and one sentence.

    Raises:
        UserFault: no budget has a run from both starts.
    """
    values = _values(params, children)
    failed = {child.key: child.why for child in children if not child.ended_well}
    rows, gains = [], []
    for amount in params.amounts:
        of = {start: values.get((start, amount), {}) for start in STARTS}
        rows += [
            {"start": start, params.unit: amount, **_summary(list(of[start].values()))} for start in STARTS if of[start]
        ]
        pairs = [of["model"][seed] - of["random"][seed] for seed in sorted(of["model"].keys() & of["random"].keys())]
        if pairs:
            gains.append({params.unit: amount, **_summary(pairs), "verdict": verdict(pairs)})
    if not gains:
        first = next(iter(failed.items()), ("", "there is no child"))
        raise UserFault(
            f"No budget has a result from both starts; {first[0]}: {first[1]}", code="child_failed", phase="gather"
        )
    training = facts.spec.training
    steps = training.steps or (HEAD_STEPS if params.finetune == HEADS_ONLY else None)
    budget = {"steps": steps} if steps else {"epochs": training.epochs}
    said = sentence(params, gains)
    return Gathered(
        {"sentence": said, "rows": rows, "gains": gains, "budget": budget, "failed": failed},
        {f"gain/{params.unit}_{gain[params.unit]:g}": gain["mean"] for gain in gains},
        {"label_efficiency.svg": ("image/svg+xml", _drawn(params, rows).encode())},
    )


def _values(params: LabelEfficiencyParams, children: Sequence[Child]) -> dict[tuple[str, float], dict[int, float]]:
    """Give test accuracies by start and budget, and by seed."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    by_key = {cell.key: cell for cell in cells(params)}
    for child in children:
        if not child.ended_well:
            continue
        if child.key.endswith("-heads"):
            start = child.key.removesuffix("-heads")
            for row in (child.result or {}).get("rows", []):
                found.setdefault((start, row[params.unit]), {})[row["seed"]] = row["test/accuracy"]
        elif (accuracy := child.metrics.get("test/accuracy")) is not None:
            cell = by_key[child.key]
            found.setdefault((cell.start, cell.amount), {})[cell.seed] = accuracy
    return found


def _summary(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": statistics.fmean(values), "spread": spread, "values": values}


def verdict(gains: Sequence[float]) -> str:
    """Say what paired differences show: `gains`, `costs`, `unclear` where the spread is as large, or `one run`."""
    if len(gains) == 1:
        return "one run"
    mean, spread = statistics.fmean(gains), statistics.stdev(gains)
    if abs(mean) <= spread:
        return "unclear"
    return "gains" if mean > 0 else "costs"


def sentence(params: LabelEfficiencyParams, gains: Sequence[dict[str, Any]]) -> str:
    """Say in one sentence whether pretraining paid, budget by budget."""
    said: list[str] = []
    for gain in gains:
        points, spread = 100 * gain["mean"], 100 * (gain["spread"] or 0)
        match gain["verdict"]:
            case "gains" | "costs":
                what = f"{gain['verdict']} {abs(points):.1f} ± {spread:.1f} points ({gain['n']} seeds)"
            case "unclear":
                what = f"makes no clear difference ({points:+.1f} ± {spread:.1f} points, {gain['n']} seeds)"
            case _:
                what = f"{'gains' if points >= 0 else 'costs'} {abs(points):.1f} points in the only pair of runs"
        said.append(f"{'With' if not said else 'with'} {params.words(gain[params.unit])}, pretraining {what}")
    return "; ".join(said) + "."


def _drawn(params: LabelEfficiencyParams, rows: Sequence[dict[str, Any]]) -> str:
    names = {"random": "random start", "model": "pretrained"}
    series = {
        names[start]: [
            (row[params.unit], 100 * row["mean"], 100 * row["spread"] if row["spread"] is not None else None)
            for row in rows if row["start"] == start
        ]
        for start in STARTS if any(row["start"] == start for row in rows)
    }  # fmt: skip
    of_fractions = params.unit == "label_fraction"
    return chart.lines(
        series, title="Does pretraining pay?", y_label="test accuracy, %",
        x_label="part of the labels" if of_fractions else "labels per class",
        ticks={amount: f"{amount * 100:.3g} %" if of_fractions else f"{amount:g}" for amount in params.amounts},
    )  # fmt: skip


RECIPE = Recipe(
    name="label_efficiency",
    kind="apply",
    version="1",
    summary="Measure whether pretraining pays: fine-tuning from a random start and from a model over label budgets.",
    tasks=("image_classification",),
    Params=LabelEfficiencyParams,
    requires=Requires(labels=True, test_labels=True, trained=True, min_samples=2, min_classes=2, without=WITHOUT),
    defaults={"training": {"steps": 500}},
    plan=plan,
    gather=gather,
)
