"""Everything that a run must not lose: where it is, and how that goes into a checkpoint and out again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from app.domain.errors import SystemFault
from worker.checkpoint import Contents
from worker.parts.ema import Average
from worker.parts.optim import Optimizers
from worker.parts.tuning import Plan
from worker.parts.window import Window


@dataclass
class State:
    """Where a run is, apart from the tensors: the JSON part of a checkpoint."""

    step: int = 0
    best: dict[str, Any] | None = None  # {"metric", "value", "step"}
    waited: int = 0  # looks without improvement
    metrics: dict[str, float | None] = field(default_factory=dict)  # the latest of each
    told: list[str] = field(default_factory=list)  # those of them that are newer than the last judgement, sorted
    ended_by: str | None = None
    collapse_reported: bool = False
    seconds: float | None = None  # kept only under max_seconds, so that other checkpoints hold no time

    def note(self, numbers: Mapping[str, float]) -> dict[str, float | None]:
        """Keep numbers as the latest of their names, and give them: null where one is not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.metrics.update(finite)
        self.told = sorted({*self.told, *finite})
        return finite


def pack(
    state: State, plan: Plan, module: nn.Module, optimizer: Optimizers, average: Average | None,
    scaler: torch.amp.GradScaler, window: Window, best_weights: Mapping[str, Tensor],
) -> Contents:  # fmt: skip
    """Gather a run into what a checkpoint holds."""
    tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    tensors |= {f"average.{name}": value for name, value in (average.weights if average else {}).items()}
    if len(window):
        tensors["window.values"] = window.values()
    # Where the best weights are the present ones they need not be written twice.
    best_is_here = state.best is not None and state.best["step"] == state.step and average is None
    if not best_is_here:
        tensors |= {f"best.{name}": value for name, value in best_weights.items()}
    return Contents(tensors, {
        "run": asdict(state), "plan": plan.model_dump(mode="json"), "scaler": scaler.state_dict(),
        "average_updates": average.updates if average else 0, "window": window.names,
        "best_is_here": bool(best_weights) and best_is_here,
    })  # fmt: skip


def unpack(
    saved: Contents, module: nn.Module, optimizer: Optimizers, average: Average | None, scaler: torch.amp.GradScaler,
    window: Window, best_weights: dict[str, Tensor],
) -> State:  # fmt: skip
    """Put a checkpoint back into a freshly built run.

    Raises:
        SystemFault: it is another run's.
    """
    device = next(iter(module.parameters())).device
    try:
        state = State(**saved.state["run"])
        module.load_state_dict(saved.part("model"))
        optimizer.load_state(saved.part("optimizer"))
        if average is not None:
            average.load(saved.part("average"), saved.state["average_updates"])
        if scaler.is_enabled():
            scaler.load_state_dict(saved.state["scaler"])
        window.load(saved.part("window").get("values", torch.empty(0)), saved.state["window"], device)
        best = saved.part("model" if saved.state["best_is_here"] else "best")
        best_weights.update({name: value.to(device).clone() for name, value in best.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise SystemFault(
            f"The checkpoint does not fit this run: {error}", code="checkpoint_does_not_fit",
            hint="Start again with /retry, without the checkpoint.",
        ) from error  # fmt: skip
    return state


def first_not_finite(module: nn.Module, optimizer: Optimizers) -> str | None:
    """Name what of a run holds something else than numbers: a weight, a norm's statistic, the optimiser's state.

    A sum tells, which is read from the device once for all of them. What is not trained is not looked at.
    """
    named = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    for name, norm in module.named_modules():
        if isinstance(norm, _NormBase) and norm.training:
            found = {"running_mean": norm.running_mean, "running_var": norm.running_var}
            named |= {f"{name}.{each}": value for each, value in found.items() if value is not None}
    named |= {f"the optimiser's {name}": value for name, value in optimizer.state().items()}
    if not named:
        return None
    device = next(iter(named.values())).device
    sums = torch.stack([value.sum(dtype=torch.float32).to(device) for value in named.values()])
    if bool(sums.isfinite().all()):
        return None
    return list(named)[int((~sums.isfinite()).int().argmax())]
