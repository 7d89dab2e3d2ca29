"""Networks without their head: `build_backbone` makes one by name, `stages` takes it apart.

A backbone maps `[batch, channels, size, size]` to features `[batch, d]` and keeps torchvision's own names in its state
dict, so that its weights stay the user's: `backbone.dimension` is d, `backbone.head_path` the name under which a head
belongs in the same state dict, `backbone.head_bias` whether that head has a bias.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast, get_type_hints

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from app.domain.errors import UserFault
from worker.parts import small_networks
from worker.parts.families import AUXILIARY, FAMILIES, Change, ExactPool, Family, Layout, Part, Step
from worker.parts.weights import pretrained_state

SMALL = ("small_cnn", "mlp", "small_vit")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "small_cnn": {"width": 1.0, "whitening": False},
    "mlp": {"hidden": (512, 256), "activation": "relu"},
    "small_vit": {"patch": 4, "width": 192, "depth": 6, "heads": 3},
}


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


class Blueprint(NamedTuple):
    """How to make a torchvision network that differs from the stock one: a constructor and changes after it."""

    constructor: str  # below torchvision.models
    options: dict[str, Any]
    changes: list[Change]
    dimension: int  # of the features that the constructor's own head expects


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


def initialise_from(backbone: nn.Module, images: Tensor) -> None:
    """Set what a fresh backbone takes from data before its first step: the filters of a whitening stem.

    `images` are normalised, `[n, channels, size, size]`; a few hundred are enough. Does nothing for other networks.
    """
    if small_networks.fixed_stem(backbone):
        small_networks.whiten(cast(nn.Sequential, backbone), images)


class _ParametersOnMeta(TorchFunctionMode):
    """Parameters get no memory, small constant tables do: some constructors compute with those."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Build networks without memory or initialisation: only names and shapes."""
    with _ParametersOnMeta():
        yield


def _assemble(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> tuple[nn.Module, Blueprint | None]:
    name = architecture["architecture"]
    if name not in names():
        raise UserFault(f"There is no architecture {name!r}.", code="unknown_architecture")
    if name in ("small_cnn", "mlp"):
        return _small(architecture, channels=channels, image_size=image_size), None
    return _torchvision(architecture, channels=channels, image_size=image_size)


def _small(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> nn.Module:
    name = architecture["architecture"]
    options = own_options(architecture)
    _refuse_weights(architecture)
    if name == "small_cnn":
        network = small_networks.small_cnn(channels=channels, image_size=image_size, **options)
        *blocks, pool, _ = network.named_children()
        keep = architecture.get("keep_stages")
        _check_keep(name, keep, len(blocks))
        if keep is not None and keep < len(blocks):
            for dropped, _ in blocks[keep:]:
                setattr(network, dropped, nn.Identity())
            setattr(network, pool[0], nn.AdaptiveAvgPool2d(1))
    else:
        if architecture.get("keep_stages") is not None:
            raise UserFault("An mlp has no keep_stages; list fewer layers in `hidden`.", code="keep_stages")
        network = small_networks.mlp(channels=channels, image_size=image_size, **options)
    with torch.no_grad():
        dimension = _last_width(network)
    return _finished(network, dimension=dimension, head_path="head", keep=architecture.get("keep_stages"))


def own_options(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of one of our small networks, defaults filled in."""
    defaults = _DEFAULTS[architecture["architecture"]]
    options = {key: architecture.get(key, value) for key, value in defaults.items()}
    known = {"architecture", "weights", "image_size", "stem", "keep_stages", *defaults}
    if unknown := sorted(set(architecture) - known):
        raise UserFault(f"{architecture['architecture']} has no option {unknown[0]!r}.", code="unknown_option")
    if architecture.get("stem", "standard") != "standard":
        raise UserFault(f"{architecture['architecture']} has no small stem: leave `stem` out.", code="stem")
    return options


def _refuse_weights(architecture: Mapping[str, Any]) -> None:
    if architecture.get("weights") is not None:
        raise UserFault(f"There are no published weights for {architecture['architecture']}.", code="unknown_weights")


def _last_width(network: nn.Sequential) -> int:
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    last = layers[-1]
    return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features


def _check_keep(name: str, keep: int | None, most: int) -> None:
    if keep is not None and keep > most:
        raise UserFault(f"{name} has {most} stages; keep_stages is {keep}.", code="keep_stages")


def _finished(
    network: nn.Module, *, dimension: int, head_path: str, keep: int | None, head_bias: bool = True
) -> nn.Module:
    # Plain attributes, so that they survive a deep copy and stay out of the state dict.
    marked: Any = network
    marked.dimension, marked.keep_stages = dimension, keep
    marked.head_path, marked.head_bias = head_path, head_bias
    return network


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


def _torchvision(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> tuple[nn.Module, Blueprint]:
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
    if isinstance(network, tv.VGG | tv.AlexNet):
        apply_change(network, Change("avgpool", ExactPool(*cast(Any, network.avgpool).output_size)))
    if isinstance(network, tv.SqueezeNet):
        # Its last layer is a convolution whose output is clipped by a ReLU and pooled; here the features are pooled.
        change("classifier.0", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(0.5)))
        change("classifier.2", nn.Identity())
        change("classifier.3", nn.Identity())
    if architecture.get("weights") is not None:
        if name == "small_vit":
            _refuse_weights(architecture)
        _load_published(network, family, architecture, image_size)
    _change_stem(network, family, architecture, channels, change)
    keep = architecture.get("keep_stages")
    body = family.layout(network).body
    _check_keep(name, keep, len(body))
    head_path = family.head
    if keep is not None and keep < len(body):
        dimension = _channels_after(architecture, channels, image_size, keep)
        for path, value in family.cut(network, keep, dimension):
            change(path, value)
        head_path = family.cut_head or family.head
    network = _finished(network, dimension=dimension, head_path=head_path, keep=keep, head_bias=family.bias)
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
        network, _ = _torchvision(whole, channels=channels, image_size=image_size)
    network.to("meta").eval()
    family = family_of(architecture["architecture"])
    x = torch.empty(1, channels, image_size, image_size, device="meta")
    with torch.no_grad():
        for part in family.layout(network).body[:keep]:
            x = Stage(part.steps, part.parameters)(x)
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
