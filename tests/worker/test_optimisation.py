"""Schedules, parameter groups, optimisers, averages and seeds."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from app.domain.spec import Optimizer
from worker.parts import optim, schedule
from worker.parts.ema import Average
from worker.parts.seed import derive, generator

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
        ("cosine", {0.0: 1.0, 0.5: 0.5, 1.0: 0.0, 1 / 3: 0.75}),
        ("linear", {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        ("step", {0.0: 1.0, 0.33: 1.0, 0.34: 0.1, 0.66: 0.1, 0.67: 0.01, 1.0: 0.01}),
        ("triangular", {0.0: 0.2, 0.115: 0.6, 0.23: 1.0, 1.0: 0.07}),
    ],
)
def test_schedules_pass_through_known_points(name: schedule.Schedule, points: dict[float, float]) -> None:
    for fraction, value in points.items():
        assert schedule.scale(name, fraction) == pytest.approx(value, abs=1e-6), fraction


@pytest.mark.parametrize("name", ["cosine", "constant", "linear", "step"])
def test_warm_up_rises_linearly_and_the_rest_is_the_whole_curve(name: schedule.Schedule) -> None:
    assert schedule.scale(name, 0.1, 0.2) == pytest.approx(0.5)
    for rest in (0.0, 0.3, 0.9):
        assert schedule.scale(name, 0.2 + 0.8 * rest, 0.2) == pytest.approx(schedule.scale(name, rest))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3)
        self.pos_embedding = nn.Parameter(torch.rand(1, 4, 8))
        self.head = nn.Linear(8, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def loss(self) -> torch.Tensor:
        x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        x = self.stem(self.norm(x)).square().mean((2, 3)) + self.pos_embedding.mean((0, 1))
        return self.head(x).square().mean()


def test_norms_biases_and_positions_are_not_decayed_and_scales_reach_what_they_name() -> None:
    network = Network()
    found = optim.groups(
        network,
        [{"params": list(network.head.parameters()), "lr_scale": 10.0}, {"names": ["stem"], "weight_decay_scale": 0.5}],
    )
    scales = {name: (g.learning_rate_scale, g.weight_decay_scale) for g in found for name in g.names}
    assert scales == {
        "stem.weight": (1.0, 0.5), "stem.bias": (1.0, 0.0), "norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0),
        "pos_embedding": (1.0, 0.0), "head.weight": (10.0, 1.0), "head.bias": (10.0, 0.0),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_no_gradient_is_held_from_one_step_to_the_next(name: Any) -> None:
    network = Network()
    network.stem.weight.data = network.stem.weight.data.to(memory_format=torch.channels_last)
    optimizer = optim.build(optim.groups(network), Optimizer(name=name))
    network.loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    updated = [parameter for part in optimizer._parts for group in part.param_groups for parameter in group["params"]]
    assert any(parameter.ndim == 4 or name == "muon" for parameter in updated)
    assert all(parameter.grad is None for parameter in (*updated, *network.parameters()))


class Operations(TorchDispatchMode):
    """Writes down what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "kernel"), [("sgd", "_fused_sgd_"), ("adam", "_fused_adam_"),
                                              ("adamw", "_fused_adamw_"), ("muon", "_fused_adamw_")])  # fmt: skip
def test_a_step_is_one_fused_kernel_per_group(name: Any, kernel: str) -> None:
    network = Network()
    optimizer = optim.build(optim.groups(network), Optimizer(name=name))
    network.loss().backward()
    with Operations() as seen:
        optimizer.step(torch.amp.GradScaler("cpu", enabled=False))
    assert kernel in seen.names
    assert name == "muon" or "addcmul_" not in seen.names


def steps(network: Network, optimizer: optim.Optimizers, count: int) -> None:
    for number in range(count):
        optimizer.schedule(0.01 * (number + 1), 0.1)
        network.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


BETAS = {"betas": (0.7, 0.95)}
REFERENCES = {
    "sgd": (torch.optim.SGD, {}, {"momentum": 0.9}),
    "sgd, nesterov": (torch.optim.SGD, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.5, "nesterov": True}),
    "sgd, no momentum": (torch.optim.SGD, {"momentum": 0.0}, {}),
    "adam": (torch.optim.Adam, {}, {}),
    "adam, betas": (torch.optim.Adam, BETAS, BETAS),
    "adamw": (torch.optim.AdamW, {}, {}),
    "adamw, betas": (torch.optim.AdamW, BETAS, BETAS),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_an_optimiser_is_torchs_plain_one(name: str) -> None:
    torchs, asked, given = REFERENCES[name]
    one, other = Network(), Network()
    steps(one, optim.build(optim.groups(one), Optimizer.model_validate({"name": name.split(",")[0], **asked})), 5)
    trained = [p for p in other.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and p is not other.pos_embedding]
    rest = [p for p in trained if not any(p is each for each in decayed)]
    reference = torchs([{"params": decayed}, {"params": rest}], lr=0.0, **given)
    for number in range(5):
        for group, decay in zip(reference.param_groups, (0.1, 0.0), strict=True):
            group["lr"], group["weight_decay"] = 0.01 * (number + 1), decay
        other.loss().backward()
        reference.step()
        reference.zero_grad()
    for (key, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=key)


@pytest.mark.parametrize("asked", [{}, {"momentum": 0.6, "nesterov": True}])
def test_muon_is_torchs_over_filters_as_matrices(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "has_bfloat16", lambda: True)
    one, other = Network(), Network()
    steps(one, optim.build(optim.groups(one), Optimizer.model_validate({"name": "muon", **asked})), 5)
    matrix = nn.Parameter(other.stem.weight.detach().reshape(8, -1).clone())
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": False, **asked}
    reference = torch.optim.Muon([matrix], lr=0.0, adjust_lr_fn="match_rms_adamw", **options)
    for number in range(5):
        # The rest of the network moves as AdamW moves it, and with it the gradients of the filters.
        other.load_state_dict({**part_way(number, asked), "stem.weight": matrix.detach().reshape(8, 3, 3, 3)})
        other.loss().backward()
        assert other.stem.weight.grad is not None
        matrix.grad = other.stem.weight.grad.reshape(8, -1).clone()
        other.zero_grad()
        reference.param_groups[0]["lr"], reference.param_groups[0]["weight_decay"] = 0.01 * (number + 1), 0.1
        reference.step()
    torch.testing.assert_close(one.stem.weight.detach().reshape(8, -1), matrix.detach())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(8, 27), (27, 8)])
def test_without_instructions_for_bfloat16_muon_is_torchs_in_float32(
    shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "has_bfloat16", lambda: False)
    draws = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(shape, generator=draws), [torch.randn(shape, generator=draws) for _ in range(5)]
    wanted, made = Optimizer(name="muon", nesterov=nesterov), list[nn.Parameter]()
    optimizers = [
        optim._muon([{"params": [nn.Parameter(start.clone())]}], wanted),
        torch.optim.Muon([nn.Parameter(start.clone())], momentum=wanted.momentum, nesterov=nesterov,
                         adjust_lr_fn="match_rms_adamw"),
    ]  # fmt: skip
    assert [type(each) for each in optimizers] == [optim.Float32Muon, torch.optim.Muon]
    for optimizer in optimizers:
        (matrix,) = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0].update(lr=0.01, weight_decay=0.1)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        made.append(matrix)
    moved = (made[1] - start).norm()
    assert (made[0] - made[1]).norm() < 0.02 * moved, "but for the rounding of bfloat16"
    assert optimizers[0].state[made[0]].keys() == optimizers[1].state[made[1]].keys()


def part_way(count: int, asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    network = Network()
    steps(network, optim.build(optim.groups(network), Optimizer.model_validate({"name": "muon", **asked})), count)
    return network.state_dict()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_filters_along_orthogonal_directions_and_leaves_the_rest_to_adamw(
    memory_format: torch.memory_format,
) -> None:
    network = Network()
    network.to(memory_format=memory_format)  # type: ignore[call-overload]
    before = copy.deepcopy(network)
    optimizer = optim.build(optim.groups(network), Optimizer(name="muon", momentum=0.0))
    steps(network, optimizer, 1)
    moved = (network.stem.weight - before.stem.weight * (1 - 0.01 * 0.1)).detach().reshape(8, -1)
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 3, "all directions move about as far"
    adam = copy.deepcopy(before)
    steps(adam, optim.build(optim.groups(adam), Optimizer(name="adamw")), 1)
    for name in ("head.weight", "head.bias", "stem.bias", "pos_embedding"):
        torch.testing.assert_close(network.state_dict()[name], adam.state_dict()[name], msg=name)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_the_state_goes_out_and_in_again(name: str) -> None:
    wanted = Optimizer.model_validate({"name": name})
    one, other = Network(), Network()
    first = optim.build(optim.groups(one), wanted)
    steps(one, first, 3)
    other.load_state_dict(one.state_dict())
    second = optim.build(optim.groups(other), wanted)
    second.load_state({key: value.clone() for key, value in first.state().items()})
    assert first.state().keys() == second.state().keys()
    steps(one, first, 2)
    steps(other, second, 2)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_reset_forgets_the_state_of_some_parameters() -> None:
    network = Network()
    optimizer = optim.build(optim.groups(network), Optimizer(name="muon"))
    steps(network, optimizer, 2)
    before = len(optimizer.state())
    optimizer.reset(p for name, p in network.named_parameters() if name in ("stem.weight", "head.weight"))
    assert len(optimizer.state()) == before - 1 - 3, "Muon's one tensor and AdamW's three"


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_layer_that_thaws_later_is_a_beginner_beside_the_others(name: str) -> None:
    """Gradual unfreezing gives a group whose members have state and others that have none."""
    together = nn.ParameterDict({each: nn.Parameter(torch.ones(4, 4)) for each in ("early", "late")})
    optimizer = optim.build(optim.groups(together), Optimizer.model_validate({"name": name}))
    single = nn.ParameterDict({"late": nn.Parameter(torch.ones(4, 4))})
    other = optim.build(optim.groups(single), Optimizer.model_validate({"name": name}))
    for step in range(4):
        optimizer.schedule(0.1, 0.0)
        together["early"].grad = torch.eye(4) + step
        if step > 1:
            other.schedule(0.1, 0.0)
            together["late"].grad = single["late"].grad = torch.eye(4) * step + 0.1
            other.step()
        optimizer.step()
    assert torch.equal(together["late"], single["late"])
    assert not torch.equal(together["late"], torch.ones(4, 4))


def test_an_average_follows_the_formula_and_swaps_in_and_out() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    average = Average(network, 0.9)
    expected = 0.0
    for update in range(1, 200):
        network.weight.data.fill_(float(update))
        average.update()
        decay = min(0.9, update / (update + 9))  # (1 + updates before) / (10 + updates before)
        expected = decay * expected + (1 - decay) * update
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-5)
    with average.in_place():
        assert network.weight.item() == pytest.approx(expected, rel=1e-5)
    assert network.weight.item() == 199.0
    average.keep()
    assert network.weight.item() == pytest.approx(expected, rel=1e-5)


def test_seeds_of_neighbouring_steps_have_nothing_in_common() -> None:
    seeds = [derive(seed, "inputs", step) for seed in range(4) for step in range(50)]
    assert len(set(seeds)) == 200
    draws = torch.stack([torch.rand(1000, generator=generator(0, "inputs", step)) for step in range(6)])
    correlation = torch.corrcoef(draws) - torch.eye(6)
    assert correlation.abs().max() < 0.15
    assert derive(1, "a", 2) == derive(1, "a", 2) != derive(1, "a2")
    assert math.isclose(draws.mean().item(), 0.5, abs_tol=0.02)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_filters_in_channels_last_are_updated_as_contiguous_ones(name: str) -> None:
    networks = [Network(), Network().to(memory_format=torch.channels_last)]  # type: ignore[call-overload]
    states: list[dict[str, torch.Tensor]] = []
    for network in networks:
        made = optim.build(optim.groups(network), Optimizer(name=name, nesterov=True))  # type: ignore[arg-type]
        for _ in range(3):
            made.schedule(0.05, 0.01)
            network.loss().backward()
            made.step()
            made.zero_grad()
        states.append(dict(network.state_dict()))
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, msg=key)
    assert networks[1].stem.weight.is_contiguous(memory_format=torch.channels_last)
