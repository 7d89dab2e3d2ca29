"""Networks of torchvision, changed: another stem, another number of channels, fewer stages, published weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast, get_type_hints

import torch
import torchvision.models as tv
from torch import nn
from torch.overrides import TorchFunctionMode

from app.domain.errors import UserFault
from worker.parts.exact_pool import ExactPool
from worker.parts.families import AUXILIARY, FAMILIES, Change, Family
from worker.parts.small_networks import check_keep, marked, own_options, refuse_weights
from worker.parts.weights import differences, pretrained_state


class Blueprint(NamedTuple):
    """How to make a torchvision network that differs from the stock one: a constructor and changes after it."""

    constructor: str  # below torchvision.models
    options: dict[str, Any]
    changes: list[Change]
    dimension: int  # of the features that the constructor's own head expects


class _ParametersOnMeta(TorchFunctionMode):
    """Parameters get no memory, small constant tables do: some constructors compute with those."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Undrawn(TorchFunctionMode):
    """In place of random numbers come zeros, which also end torch's search for some within bounds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            tensor.detach().zero_()
            return tensor
        return func(*args, **kwargs)


# The last three come whole to a mode, and then do their work out of its sight.
_DRAWS = (torch.Tensor.uniform_, torch.Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)


@contextmanager
def undrawn_parameters() -> Iterator[None]:
    """Build networks whose every weight is loaded right after: for ResNet-18 a fifth of a second less."""
    with _Undrawn():
        yield


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Build networks without memory or initialisation: only names and shapes."""
    with _ParametersOnMeta():
        yield


def family_of(name: str) -> Family:
    """Give the family of a torchvision name, or of small_vit."""
    if name == "small_vit":
        return FAMILIES[tv.VisionTransformer]
    return FAMILIES[get_type_hints(tv.get_model_builder(name))["return"]]


def _constructor(architecture: Mapping[str, Any], image_size: int) -> tuple[str, dict[str, Any]]:
    name = architecture["architecture"]
    if name != "small_vit":
        return name, family_of(name).options(image_size)
    own = own_options(architecture)
    width = own["width"]
    if width % own["heads"]:
        raise UserFault(f"small_vit's width {width} must be a multiple of its heads {own['heads']}.", code="width")
    options = {
        "image_size": image_size, "patch_size": own["patch"], "num_layers": own["depth"], "num_heads": own["heads"],
        "hidden_dim": width, "mlp_dim": 4 * width,
    }  # fmt: skip
    return "VisionTransformer", options


def stock_network(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> tuple[nn.Module, Blueprint]:
    """Build a torchvision network without its head, changed as asked, and say how it was made."""
    name = architecture["architecture"]
    family = family_of(name)
    constructor, options = _constructor(architecture, image_size)
    make = getattr(tv, constructor)
    _check_size(name, family, options, image_size)
    network: nn.Module = make(num_classes=1, **options)
    changes: list[Change] = []

    def change(path: str, value: nn.Module | int) -> None:
        changes.append(Change(path, value))
        apply_change(network, changes[-1])

    head = network.get_submodule(family.head)
    dimension = expected = int(getattr(head, "in_features", 0) or getattr(head, "in_channels", 0))
    apply_change(network, Change(family.head, nn.Identity()))
    if isinstance(network, tv.MNASNet):
        # Its own loader insists on a version that a plain dictionary of tensors cannot carry.
        plain: Any = partial(nn.Module._load_from_state_dict, network)
        network._load_from_state_dict = plain
    if isinstance(network, tv.VGG | tv.AlexNet):
        apply_change(network, Change("avgpool", ExactPool(*cast(Any, network.avgpool).output_size)))
    if isinstance(network, tv.SqueezeNet):
        # Its last layer is a convolution whose output is clipped by a ReLU and pooled; here the features are pooled.
        change("classifier.0", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(0.5)))
        change("classifier.2", nn.Identity())
        change("classifier.3", nn.Identity())
    if architecture.get("weights") is not None:
        if name == "small_vit":
            refuse_weights(architecture)
        _load_published(network, family, architecture, image_size)
    _change_stem(network, family, architecture, channels, change)
    keep = architecture.get("keep_stages")
    body = family.layout(network).body
    check_keep(name, keep, len(body))
    head_path = family.head
    if keep is not None and keep < len(body):
        dimension = _channels_after(architecture, channels, image_size, keep)
        for path, value in family.cut(network, keep, dimension):
            change(path, value)
        head_path = family.cut_head or family.head
    network = marked(network, dimension=dimension, head_path=head_path, keep=keep, head_bias=family.bias)
    return network, Blueprint(constructor, options, changes, expected)


def _check_size(name: str, family: Family, options: dict[str, Any], image_size: int) -> None:
    if family.kind == "vit":
        patch = options.get("patch_size") or int(name.rsplit("_", 1)[1])
        if image_size % patch:
            raise UserFault(
                f"{name} cuts the image into patches of {patch}: image_size {image_size} is not a multiple of it.",
                code="image_size",
            )
    if name == "maxvit_t" and image_size % 224:
        raise UserFault(f"maxvit_t needs an image_size that is a multiple of 224, not {image_size}.", code="image_size")


def apply_change(network: nn.Module, change: Change) -> None:
    """Put the change into the network."""
    parent, _, last = change.path.rpartition(".")
    owner = network.get_submodule(parent)
    if isinstance(change.value, int):
        setattr(owner, last, getattr(owner, last)[: change.value])
    else:
        setattr(owner, last, change.value)


def _change_stem(
    network: nn.Module,
    family: Family,
    architecture: Mapping[str, Any],
    channels: int,
    change: Callable[[str, nn.Module], None],
) -> None:
    small = architecture.get("stem", "standard") == "small"
    if small and family.pools is None:
        raise UserFault(f"{architecture['architecture']} has no small stem: leave `stem` out.", code="stem")
    if not small and channels == 3:
        return
    first = cast(nn.Conv2d, network.get_submodule(family.first))
    shape: dict[str, Any] = {
        "kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding
    }  # fmt: skip
    if small:
        shape = {"kernel_size": 3, "stride": 1, "padding": 1}
    replacement = nn.Conv2d(channels, first.out_channels, **shape, bias=first.bias is not None)
    if family.kind == "vit":
        # As torchvision starts it. By the fan-out, patches of one channel would hardly be seen beside their positions.
        fan_in = math.prod(replacement.kernel_size) * channels
        nn.init.trunc_normal_(replacement.weight, std=math.sqrt(1.0 / fan_in))
    elif not small:
        # As torchvision starts it. A small stem stays as PyTorch starts it: by the fan-out its filters would be half as
        # large, so that behind a batch norm every step turned them four times as far (k-NN after a short SimCLR, three
        # seeds: 30.0 and 31.4 %; fine-tuning does not mind).
        fan_out = math.prod(replacement.kernel_size) * replacement.out_channels
        nn.init.normal_(replacement.weight, std=math.sqrt(2.0 / fan_out))
    if replacement.bias is not None:
        nn.init.zeros_(replacement.bias)
    if architecture.get("weights") is not None and not small and channels == 1:
        # A grey image is three equal channels, so the sum of the filters sees what the three saw.
        replacement.load_state_dict({**first.state_dict(), "weight": first.weight.detach().sum(1, keepdim=True)})
    change(family.first, replacement)
    for pool in family.pools if small and family.pools else ():
        change(pool, nn.Identity())


def _channels_after(architecture: Mapping[str, Any], channels: int, image_size: int, keep: int) -> int:
    """Find the channels after the first `keep` stages by passing shapes, no numbers, through them."""
    whole = {**architecture, "weights": None, "keep_stages": None}
    with meta_parameters():
        network, _ = stock_network(whole, channels=channels, image_size=image_size)
    network.to("meta").eval()
    family = family_of(architecture["architecture"])
    x = torch.empty(1, channels, image_size, image_size, device="meta")
    with torch.no_grad():
        for part in family.layout(network).body[:keep]:
            for step in part.steps:
                x = step(x)
    return int(x.shape[1] if x.dim() == 4 and not isinstance(network, tv.SwinTransformer) else x.shape[-1])


def _load_published(network: nn.Module, family: Family, architecture: Mapping[str, Any], image_size: int) -> None:
    name, weights = architecture["architecture"], architecture["weights"]
    state = pretrained_state(name, weights)
    prefix = f"{family.head}."
    state = {key: value for key, value in state.items() if not AUXILIARY.match(key)}
    state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    if isinstance(network, tv.VisionTransformer):
        state = dict(
            tv.vision_transformer.interpolate_embeddings(image_size, network.patch_size, state)  # pyright: ignore[reportArgumentType]
        )
    if problems := differences(network.state_dict(), state):
        raise UserFault(f"{weights} does not fit {name}: {'; '.join(problems)}.", code="weights_do_not_fit")
    network.load_state_dict(state, strict=True)
