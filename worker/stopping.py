"""When the numbers of a run end it: early stopping by a metric, and a representation that has collapsed."""

import math
from collections.abc import Mapping

from torch import nn

from app.domain.errors import UserFault
from app.domain.metrics import falls
from app.domain.spec import Training
from worker.data.source import Data
from worker.parts.metrics import collapsed
from worker.parts.tuning import Plan
from worker.report import Reporter
from worker.state import State


def refuse_blind(training: Training, module: nn.Module, data: Data, plan: Plan) -> None:
    """Refuse, before the first step, to stop by what this run will never measure, or by what says nothing of it.

    Raises:
        UserFault: it has no validation samples, or no probes; the metric's name begins with none of the three prefixes;
            it is the sum of what two networks fight about, which does not fall when both become better; training does
            not change it; or it is no measure of quality.
    """
    if training.early_stopping is None:
        return
    name, why = training.early_stopping.metric, None
    if name.startswith("validation/") and data.validation is None:
        why = "no validation samples: bring a validation split"
    elif name.startswith("probe/") and (not plan.probe_every or data.probe is None):
        why = "no probes: only pretraining looks at its features"
    elif not name.startswith(("train/", "validation/", "probe/")):
        why = "nothing of that name: it is to begin with train/, validation/ or probe/"
    elif name == "train/loss" and hasattr(module, "opponents"):
        why = "opponents, whose loss says nothing of how good either is: use a metric of probe/"
    elif name.removeprefix("train/") in getattr(module, "fixed_numbers", ()):
        why = "one number from the start, which training does not change: use a metric of probe/"
    if why is not None:
        raise UserFault(f"training.early_stopping.metric: for {name!r} this run has {why}.", code="unknown_metric")
    try:
        falls(name)
    except ValueError as error:
        raise UserFault(f"training.early_stopping.metric: {error}", code="unknown_metric") from error


def judge(state: State, training: Training, kind: str) -> bool:
    """Say whether this is the best so far, by the metric of early stopping or else by what validation gives.

    An epoch that told nothing new of it counts neither way. What is best, how long nothing was better, and that this
    ends the run is noted in `state`.

    Raises:
        UserFault: early stopping looks at a metric that this run does not have.
    """
    wanted, told = training.early_stopping, state.told
    state.told = []
    if wanted is not None:
        name, least = wanted.metric, wanted.min_delta
        due = not name.startswith("probe/") or any(other.startswith("probe/") for other in told)
        if name not in state.metrics and due:
            raise UserFault(
                f"training.early_stopping.metric: this run has no {name!r}; it has {', '.join(sorted(state.metrics))}.",
                code="unknown_metric",
            )
    elif kind == "finetune":
        name, least = next((n for n in ("validation/accuracy", "validation/loss") if n in told), ""), 0.0
    else:
        return False
    if name not in told:
        return False
    found = state.metrics[name]
    value = math.nan if found is None else found
    before = state.best["value"] if state.best is not None else None
    gain = math.inf if before is None else (before - value if falls(name) else value - before)
    better = gain > least if before is not None else math.isfinite(value)
    if better:
        state.best, state.waited = {"metric": name, "value": value, "step": state.step}, 0
    else:
        state.waited += 1
    if wanted is not None and state.waited >= wanted.patience:
        state.ended_by = "early_stopping"
    return better


def report_collapse(
    module: nn.Module, spread: float | None, numbers: Mapping[str, float], state: State, training: Training,
    report: Reporter,
) -> None:  # fmt: skip
    """Warn, once in a run, of features or embeddings that hardly differ from sample to sample; end it where asked."""
    found = {name.removeprefix("probe/"): value for name, value in numbers.items() if name.startswith("probe/")}
    least = getattr(module, "least_spread", None)
    if least is not None and spread is not None and spread < least:
        message = f"The loss compares embeddings that hardly differ from sample to sample: a spread of {spread:.3g}."
        found["train_spread"] = spread
    elif found and collapsed(found):
        message = "The features tell the samples hardly apart any more."
    else:
        return
    if state.collapse_reported:
        return
    state.collapse_reported = True
    report.event("representation.collapsed", message, level="warning", step=state.step, **found)
    if training.stop_on_collapse:
        state.ended_by = "collapse"
