"""Weights: what keeps a state dict from fitting; torchvision's published files, fetched where the network allows."""

import re
import socket
from collections.abc import Mapping
from typing import Any
from urllib.error import URLError

import torchvision.models as tv
from torch import Tensor

from app.domain.errors import SystemFault, UserFault

_TIMEOUT_SECONDS = 30.0
_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$")


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, most: int = 5) -> list[str]:
    """Name what keeps `given` from being loaded as `wanted`: missing keys, unknown keys, other shapes."""
    missing = [f"{key} is missing" for key in wanted if key not in given]
    unknown = [f"{key} is not known" for key in given if key not in wanted]
    shapes = [
        f"{key} is {list(given[key].shape)} and should be {list(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    found = [*shapes, *missing, *unknown]
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more differences"]


def weight_names(architecture: str) -> list[str]:
    """Name the published weights of a torchvision architecture."""
    return [entry.name for entry in tv.get_model_weights(architecture)]


def pretrained_state(architecture: str, weights: str) -> dict[str, Tensor]:
    """Fetch a state dict from torchvision's host, or from the cache of an earlier fetch; its digest is checked.

    Raises:
        UserFault: there are no such weights for this architecture.
        SystemFault: the host cannot be reached, or what came is damaged.
    """
    known = tv.get_model_weights(architecture)
    name = weights.rpartition(".")[2]  # `ResNet18_Weights.IMAGENET1K_V1` is how torchvision prints it
    if name == "DEFAULT":
        name = known["DEFAULT"].name
    if name not in weight_names(architecture):
        raise UserFault(
            f"{architecture} has no weights {weights!r}; known are {', '.join(weight_names(architecture)) or 'none'}.",
            code="unknown_weights",
        )
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)  # the downloader has none of its own and would wait for ever
    try:
        state: dict[str, Any] = known[name].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise SystemFault(
            f"The weights {name} of {architecture} could not be fetched from {known[name].url}: {error}",
            code="weights_unavailable",
            hint="Let this worker reach that address, put the file into its torch hub cache, or leave `weights` out.",
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    # The oldest DenseNet files write `norm.1` where the module says `norm1`.
    return {_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def normalisation(architecture: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give mean and standard deviation per channel that the published weights of an architecture were trained with."""
    known = tv.get_model_weights(architecture)
    transform = known["DEFAULT"].transforms()
    mean, std = tuple(transform.mean), tuple(transform.std)
    if architecture in ("googlenet", "inception_v3"):
        mean, std = (0.5,) * 3, (0.5,) * 3  # what their `transform_input` comes to
    if channels == 1:
        return (sum(mean) / 3,), (sum(std) / 3,)
    return mean, std
