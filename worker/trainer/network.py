"""What a run starts from: the order's model, or the architecture in the spec."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from app.domain.spec import Architecture, Spec
from worker import evaluate
from worker.data.images import native_size
from worker.data.source import Data
from worker.parts import architectures, backbones, small_networks
from worker.parts.seed import derive
from worker.parts.stock_networks import undrawn_parameters
from worker.parts.weights import normalisation
from worker.recipe import Recipe
from worker.report import Order

WHITENED_ROWS = 1024  # training images that a whitening stem looks at
SMALLEST_SIDE = 32  # of torchvision's networks, which halve the image five times; our own small ones take 8


@dataclass(frozen=True)
class Network:
    """What the run starts from: a description that builds the backbone again, and weights to load into it."""

    architecture: dict[str, Any]
    facts: dict[str, Any]
    image_size: int
    channels: int
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None  # None: the training images' own
    weights: dict[str, Tensor] | None
    source: str

    @property
    def pretrained(self) -> bool:
        """Whether its weights are worth keeping: a model's, or published ones."""
        return self.weights is not None or self.architecture.get("weights") is not None


def choose_network(spec: Spec, order: Order, facts: DatasetFacts) -> Network:
    """Find what the run starts from: the order's model, or the architecture in the spec.

    Raises:
        UserFault: there is neither, or the architecture cannot be built so.
    """
    if order.model is not None:
        config = order.model.config
        found = _facts(config.architecture["architecture"])
        return Network(
            config.architecture, found, config.image_size, config.channels, (config.mean, config.std),
            load_file(order.model.weights), f"model {order.model.id}",
        )  # fmt: skip
    if not isinstance(spec.model, Architecture):
        raise UserFault('model: give a network to start from, such as {"architecture": "small_cnn"}.', code="no_model")
    architecture = spec.model.model_dump(mode="json")
    found = _facts(architecture["architecture"])
    size = architecture["image_size"] or _suiting_size(architecture, found, facts)
    architecture["image_size"] = size
    architectures.check(architecture)
    published = architecture["weights"] is not None
    channels = 3 if published else facts.channels
    normal = normalisation(architecture["architecture"], channels) if published else None
    return Network(architecture, found, size, channels, normal, None, architecture["architecture"])


def start_backbone(network: Network, seed: int, data: Data) -> nn.Module:
    """Build the backbone that a run starts from, with the weights that it starts with."""
    with undrawn_parameters() if network.weights is not None else nullcontext():
        backbone = backbones.build_backbone(
            network.architecture, channels=network.channels, image_size=network.image_size,
            seed=derive(seed, "backbone"),
        )  # fmt: skip
    if network.weights is not None:
        backbones.load_backbone(backbone, network.weights, source=network.source)
    elif small_networks.fixed_stem(backbone):
        rows = evaluate.probe_rows(len(data.train), seed)[:WHITENED_ROWS]
        backbones.initialise_from(backbone, data.ready(data.train.batch(rows), torch.device("cpu"))["image"])
    return backbone


def check_family(recipe: Recipe, network: Network) -> None:
    """Refuse a network that the recipe cannot train; the API does so too, but not every run comes from there."""
    families, family = recipe.requires.architectures, network.facts["family"]
    if families is None or family in families:
        return
    name = network.architecture["architecture"]
    reason = recipe.requires.reason or f"{recipe.name} works with {' and '.join(families)} networks only"
    raise UserFault(f"model.architecture: {name} is a {family} network: {reason}.", code="architecture")


def _facts(name: str) -> dict[str, Any]:
    for row in architectures.facts():
        if row["name"] == name:
            return row["facts"]
    raise UserFault(f"model.architecture: there is no {name!r}.", code="unknown_architecture")


def _suiting_size(architecture: dict[str, Any], found: dict[str, Any], facts: DatasetFacts) -> int:
    """Choose the image size: the images' own where they are small, but at least what the network was made for."""
    least = max(found["min_image_size"], 8 if architecture["architecture"] in backbones.SMALL else SMALLEST_SIDE)
    size = max(native_size(facts), least)
    if architecture["weights"] is not None:
        size = max(size, 64)
    patch = architecture.get("patch") or found["patch"] or 1
    return -(-size // patch) * patch
