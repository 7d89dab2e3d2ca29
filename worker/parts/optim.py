"""Optimisers over parameter groups: fused where torch has it, no decay on norms and biases, Muon for filters too."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.domain.spec import Optimizer
from worker.parts.machine import has_bfloat16

# Weights that are positions or tokens rather than maps; timm leaves them out of weight decay too.
_NEVER_DECAYED = ("pos_embedding", "class_token", "cls_token", "mask_token", "relative_position_bias_table")


@dataclass(frozen=True)
class Group:
    """Parameters that share their scales."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate_scale: float = 1.0
    weight_decay_scale: float = 1.0


def groups(module: nn.Module, wanted: Iterable[Mapping[str, Any]] = (), *, backbone_scale: float = 1.0) -> list[Group]:
    """Sort the trainable parameters into groups.

    Args:
        wanted: what a recipe's `parameter_groups` gave: `{"names" or "params", "lr_scale", "weight_decay_scale"}`;
            parameters that it does not name keep scale 1. A name also stands for everything below it.
        backbone_scale: multiplies the learning rates of what lies below `backbone`.

    Vectors (biases, norms) and position embeddings are not decayed, whatever the recipe says.
    """
    own = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    names_of = {id(parameter): name for name, parameter in own.items()}
    scales = dict.fromkeys(own, (1.0, 1.0))
    for entry in wanted:
        scale = (float(entry.get("lr_scale", 1.0)), float(entry.get("weight_decay_scale", 1.0)))
        for name in _names(entry, own, names_of):
            scales[name] = scale
    sorted_names: dict[tuple[float, float], list[str]] = {}
    for name, (rate, decay) in scales.items():
        if name.startswith("backbone."):
            rate *= backbone_scale
        spared = own[name].ndim < 2 or name.rpartition(".")[2] in _NEVER_DECAYED
        sorted_names.setdefault((rate, 0.0 if spared else decay), []).append(name)
    return [
        Group(tuple(names), tuple(own[name] for name in names), rate, decay)
        for (rate, decay), names in sorted_names.items()
    ]


def _names(entry: Mapping[str, Any], own: Mapping[str, nn.Parameter], names_of: Mapping[int, str]) -> list[str]:
    if "params" in entry:
        return [names_of[id(parameter)] for parameter in entry["params"] if id(parameter) in names_of]
    wanted = tuple(entry["names"])
    return [name for name in own if any(name == each or name.startswith(f"{each}.") for each in wanted)]


class Optimizers:
    """One optimiser, or Muon for matrices and filters beside AdamW for the rest, behind one face.

    `flat` holds, for some parameters, another shape of the same memory that is what torch's optimiser sees.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], flat: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self._parts, self._flat = list(parts), dict(flat)
        self.parameters = [p for part in parts for group in part.param_groups for p in group["source"]]

    def schedule(self, learning_rate: float, weight_decay: float) -> None:
        """Set what every group uses in the next step: these values times the group's own scales."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group["learning_rate_scale"]
                group["weight_decay"] = weight_decay * group["weight_decay_scale"]

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Undo the loss scaling of float16 before gradients are clipped."""
        self._pass_gradients_on()
        for part in self._parts:
            scaler.unscale_(part)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Update the weights from their gradients; under float16's scaler, unless a gradient overflowed."""
        self._pass_gradients_on()
        for part in self._parts:
            _begin_momentum(part)
            if scaler is not None and scaler.is_enabled():
                scaler.step(part)
            else:
                part.step()
        if scaler is not None and scaler.is_enabled():
            scaler.update()

    def _pass_gradients_on(self) -> None:
        for parameter, flat in self._flat.items():
            gradient = parameter.grad
            flat.grad = None if gradient is None else _in_memory_order(gradient, like=parameter).reshape(flat.shape)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None
        for flat in self._flat.values():  # or their memory would be held until the next step has its own
            flat.grad = None

    def reset(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget the state of some parameters."""
        for parameter in parameters:
            for part in self._parts:
                part.state.pop(self._flat.get(parameter, parameter), None)

    def state(self) -> dict[str, Tensor]:
        """Give the whole state as tensors by `<number of the parameter>.<name>`."""
        found: dict[str, Tensor] = {}
        for number, (part, parameter) in enumerate(self._owned()):
            for name, value in sorted(part.state.get(parameter, {}).items()):
                if value is not None:
                    found[f"{number}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`; layouts follow the parameters."""
        owned = list(self._owned())
        for part in self._parts:
            part.state.clear()
        for key, value in state.items():
            number, _, name = key.partition(".")
            part, parameter = owned[int(number)]
            if value.shape == parameter.shape and value.ndim:
                held = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                # Adam's step count: fused kernels want it beside the parameter.
                held = value.clone().to(parameter.device if part.defaults.get("fused") else "cpu")
            part.state[parameter][name] = held

    def _owned(self) -> Iterable[tuple[torch.optim.Optimizer, nn.Parameter]]:
        return ((part, p) for part in self._parts for group in part.param_groups for p in group["params"])


def build(found: Sequence[Group], optimizer: Optimizer) -> Optimizers:
    """Make the optimiser of a run; learning rates and decay come with `schedule` before every step."""
    make = _MAKERS[optimizer.name]
    view = _matrix if optimizer.name == "muon" else _straight
    flat = {
        parameter: shadow
        for group in found
        for name, parameter in zip(group.names, group.parameters, strict=True)
        if (shadow := view(name, parameter)) is not None
    }
    if optimizer.name != "muon":
        return Optimizers([make(_torch_groups(found, flat=flat), optimizer)], flat)
    matrices = _torch_groups(found, keep=lambda parameter: parameter in flat, flat=flat)
    rest = _torch_groups(found, keep=lambda parameter: parameter not in flat)
    parts = [make(matrices, optimizer)] if matrices else []
    return Optimizers([*parts, _adamw(rest, Optimizer(name="adamw"))] if rest else parts, flat)


def _begin_momentum(part: torch.optim.Optimizer) -> None:
    """Start missing momentum at zero: fused SGD crashes where some of a group have it and others, thawed later, not."""
    if not isinstance(part, torch.optim.SGD):
        return
    for group in part.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and part.state[parameter].get("momentum_buffer") is None:
                part.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _torch_groups(
    found: Sequence[Group],
    *,
    keep: Callable[[nn.Parameter], bool] = lambda _: True,
    flat: Mapping[nn.Parameter, nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for group in found:
        if own := [parameter for parameter in group.parameters if keep(parameter)]:
            made.append({
                "params": [flat[parameter] if flat and parameter in flat else parameter for parameter in own],
                "source": own,
                "learning_rate_scale": group.learning_rate_scale,
                "weight_decay_scale": group.weight_decay_scale,
            })  # fmt: skip
    return made


def _straight(_name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Give the same memory as a contiguous tensor, where it is not one: filters in channels_last.

    Fused kernels on a CPU copy whatever is not contiguous, there and back: ResNet-18's 11 million weights take sgd 13.8
    ms as channels_last filters, 4.1 ms in the order in which they lie in memory.
    """
    if parameter.is_contiguous() or not _is_channels_last(parameter):
        return None
    return nn.Parameter(_in_memory_order(parameter.detach(), like=parameter))


def _matrix(name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Give the same memory as a matrix [filters, the rest], because torch's Muon takes nothing else.

    None for what AdamW should have: vectors, tokens, and the head, whose rows are classes rather than directions.
    """
    if parameter.ndim < 2 or name.startswith("head.") or name.rpartition(".")[2] in _NEVER_DECAYED:
        return None
    # The order of the columns does not matter to an orthogonal update.
    matrix = _in_memory_order(parameter.detach(), like=parameter).reshape(len(parameter), -1)
    return nn.Parameter(matrix) if matrix.data_ptr() == parameter.data_ptr() else None


def _in_memory_order(tensor: Tensor, *, like: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if not like.is_contiguous() and _is_channels_last(like) else tensor


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _sgd(groups: list[dict[str, Any]], wanted: Optimizer) -> torch.optim.Optimizer:
    nesterov = wanted.nesterov and wanted.momentum > 0
    return torch.optim.SGD(groups, lr=0.0, momentum=wanted.momentum, nesterov=nesterov, fused=True)


def _adam(groups: list[dict[str, Any]], wanted: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.0, betas=wanted.betas, fused=True)


def _adamw(groups: list[dict[str, Any]], wanted: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=wanted.betas, fused=True)


class Float32Muon(torch.optim.Muon):
    """torch's Muon with an iteration in float32, for processors without instructions for bfloat16, in which torch's is.

    On one AVX2 core a step over `small_cnn` of half its width takes 23 ms so, and 455 in bfloat16.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; see `torch.optim.Muon`, whose names the state has."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
                rate = group["lr"] * 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(_orthogonal(update, group), alpha=-rate)
        return loss


def _orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Bring the singular values of a matrix [m, n] near 1 by Newton and Schulz (Jordan: Muon, 2024)."""
    a, b, c = group["ns_coefficients"]
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    found = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found if wide is matrix else found.T


def _muon(groups: list[dict[str, Any]], wanted: Optimizer) -> torch.optim.Optimizer:
    slow = all(each.device.type == "cpu" for group in groups for each in group["params"]) and not has_bfloat16()
    # `match_rms_adamw` lets one learning rate serve Muon and AdamW (Liu et al., arXiv 2502.16982, eq. 4).
    made = (Float32Muon if slow else torch.optim.Muon)(
        cast(Any, groups), lr=0.0, momentum=wanted.momentum, nesterov=wanted.nesterov, adjust_lr_fn="match_rms_adamw"
    )
    return cast(torch.optim.Optimizer, made)


_MAKERS: dict[str, Callable[[list[dict[str, Any]], Optimizer], torch.optim.Optimizer]] = {
    "sgd": _sgd, "adam": _adam, "adamw": _adamw, "muon": _muon,
}  # fmt: skip
