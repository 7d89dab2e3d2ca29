"""A backbone and its head as one network, under the names that plain torchvision would give to its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from app.domain.errors import UserFault
from app.domain.models import ModelConfig
from worker.parts.backbones import build_backbone
from worker.parts.heads import build_head, without_dropout
from worker.parts.stock_networks import undrawn_parameters
from worker.parts.weights import differences


class Network(nn.Module):
    """Images `[batch, channels, size, size]` to logits `[batch, classes]`, or to features where there is no head."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return features if self.head is None else self.head(features)


def assemble(config: ModelConfig) -> Network:
    """Build the network that a `config.json` describes, at a random start."""
    backbone = build_backbone(
        {**config.architecture, "weights": None}, channels=config.channels, image_size=config.image_size, seed=0
    )
    if not config.classes:
        return Network(backbone, None)
    return Network(backbone, head_of(backbone, len(config.classes), config.head))


def head_of(backbone: nn.Module, classes: int, options: Mapping[str, Any] | None) -> nn.Module:
    """Build the head that `config.head` describes: `{"hidden": [widths], "activation": name}`; null is a linear one."""
    options = options or {}
    return build_head(
        int(backbone.dimension),  # pyright: ignore[reportArgumentType]
        classes,
        hidden=tuple(options.get("hidden", ())),
        activation=options.get("activation", "relu"),
        bias=bool(backbone.head_bias),
    )


def named_state(backbone: nn.Module, head: nn.Module | None) -> dict[str, Tensor]:
    """Give the weights of both, as they are, under torchvision's names."""
    state = dict(backbone.state_dict())
    if head is not None:
        own = without_dropout(head).state_dict()
        state |= {f"{backbone.head_path}.{name}": value for name, value in own.items()}
    return state


def state_dict(backbone: nn.Module, head: nn.Module | None) -> dict[str, Tensor]:
    """Give copies of the weights of both under torchvision's names, contiguous and on the CPU."""
    return {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, value in named_state(backbone, head).items()
    }


def load_state(network: Network, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load what `state_dict` gave.

    Raises:
        UserFault: keys or shapes differ; the message names the first few.
    """
    wanted = named_state(network.backbone, network.head)
    if problems := differences(wanted, state):
        raise UserFault(f"{source} does not fit its architecture: {'; '.join(problems)}.", code="weights_do_not_fit")
    prefix = f"{network.backbone.head_path}."
    network.backbone.load_state_dict({name: value for name, value in state.items() if not name.startswith(prefix)})
    if network.head is not None:
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        without_dropout(network.head).load_state_dict(own)


def load_network(config: ModelConfig, weights: Path) -> Network:
    """Build the network of a model and load its `model.safetensors`; in eval mode."""
    with undrawn_parameters():
        network = assemble(config)
    load_state(network, load_file(weights), source=weights.name)
    return network.eval()
