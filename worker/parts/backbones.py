"""Networks without their head: `build_backbone` makes one by name, `stages` takes it apart.

A backbone maps `[batch, channels, size, size]` to features `[batch, d]` and keeps torchvision's own names in its state
dict, so that its weights stay the user's: `backbone.dimension` is d, `backbone.head_path` the name under which a head
belongs in the same state dict, `backbone.head_bias` whether that head has a bias.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torchvision.models as tv
from torch import Tensor, nn

from app.domain.errors import UserFault
from worker.parts import small_networks
from worker.parts.families import FAMILIES, Layout, Part, Step
from worker.parts.small_networks import SMALL
from worker.parts.stock_networks import Blueprint, meta_parameters, stock_network
from worker.parts.weights import differences


class Stage(nn.Module):
    """One stage of a backbone as a callable; its parameters are the backbone's own, not copies."""

    def __init__(self, steps: Sequence[Step], parameters: Sequence[nn.Parameter] = ()) -> None:
        super().__init__()
        self.steps = list(steps)
        self.modules_of_stage = nn.ModuleList([step for step in steps if isinstance(step, nn.Module)])
        self.parameters_of_stage = nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def names() -> list[str]:
    """Give the name of every architecture that can be built, torchvision's first."""
    return [*tv.list_models(module=tv), *SMALL]


def build_backbone(architecture: Mapping[str, Any], *, channels: int, image_size: int, seed: int) -> nn.Module:
    """Build a backbone: `[batch, channels, image_size, image_size]` -> `[batch, backbone.dimension]`.

    `architecture` is the `model` object of a job: `{"architecture": "resnet18", "weights": null, "stem": "small", …}`.
    The global random state is left as it was.

    Raises:
        UserFault: an unknown name, or options that this architecture does not have.
        SystemFault: the named weights could not be fetched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, _ = _assemble(architecture, channels=channels, image_size=image_size)
    return backbone


def blueprint(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> Blueprint:
    """Say how plain torchvision makes this network; weights are not looked at."""
    with meta_parameters():
        _, plan = _assemble({**architecture, "weights": None}, channels=channels, image_size=image_size)
    assert plan is not None
    return plan


def stages(backbone: nn.Module) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Take a backbone apart: `(name, stage)` in order; applied one after the other they are its forward, bit for bit.

    Each stage is an `nn.Module` whose `parameters()`, `train()` and `eval()` reach the backbone's own layers.
    """
    layout = _layout(backbone)
    body = layout.body[: _kept(backbone)]
    last = body[-1]
    body[-1] = last._replace(steps=[*last.steps, *layout.tail])
    return [(part.name, Stage(part.steps, part.parameters)) for part in body]


def stage_modules(backbone: nn.Module) -> list[Stage]:
    """Give the stages without their names."""
    return [cast(Stage, stage) for _, stage in stages(backbone)]


def freeze(backbone: nn.Module, count: int) -> None:
    """Let the first `count` stages stand still: no gradient, and eval mode for ever, so that batch norm stands too.

    Raises:
        UserFault: nothing would be left to train.
    """
    made = stage_modules(backbone)
    if count >= len(made):
        raise UserFault(
            f"params.freeze_stages is {count}, but this network has {len(made)} stages: at most {len(made) - 1} can be "
            "frozen.", code="freeze_stages",
        )  # fmt: skip
    for stage in made[:count]:
        stage.requires_grad_(False)
        stage.eval()
        for module in stage.modules():
            module.train = _stand_still  # type: ignore[method-assign,assignment]


def _stand_still(mode: bool = True) -> None:
    """Stay in eval mode, whatever the network around is told."""


def load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load the state dict of an exported model, leaving out its head.

    Raises:
        UserFault: keys or shapes differ; the message names the first few.
    """
    prefix = f"{backbone.head_path}."
    own = {key: value for key, value in state.items() if not key.startswith(prefix)}
    if problems := differences(backbone.state_dict(), own):
        raise UserFault(f"{source} does not fit this backbone: {'; '.join(problems)}.", code="weights_do_not_fit")
    backbone.load_state_dict(own, strict=True)


def initialise_from(backbone: nn.Module, images: Tensor) -> None:
    """Set what a fresh backbone takes from data before its first step: the filters of a whitening stem.

    `images` are normalised, `[n, channels, size, size]`; a few hundred are enough. Does nothing for other networks.
    """
    if small_networks.fixed_stem(backbone):
        small_networks.whiten(cast(nn.Sequential, backbone), images)


def _assemble(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> tuple[nn.Module, Blueprint | None]:
    name = architecture["architecture"]
    if name not in names():
        raise UserFault(f"There is no architecture {name!r}.", code="unknown_architecture")
    if name in ("small_cnn", "mlp"):
        return small_networks.small_network(architecture, channels=channels, image_size=image_size), None
    return stock_network(architecture, channels=channels, image_size=image_size)


def _layout(backbone: nn.Module) -> Layout:
    for kind, family in FAMILIES.items():
        if type(backbone) is kind:
            return family.layout(backbone)
    children = list(backbone.named_children())
    if children[0][0] == "flatten":
        (_, flatten), (name, first), *rest = children
        return Layout([Part(name, [flatten, first]), *(Part(name, [layer]) for name, layer in rest)], [])
    *blocks, (_, pool), (_, flatten) = children
    return Layout([Part(name, [block]) for name, block in blocks], [pool, flatten])


def _kept(backbone: nn.Module) -> int | None:
    return cast("int | None", backbone.keep_stages)
