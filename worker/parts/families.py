"""How each family of torchvision classifiers is put together: its stages, its head, its stem, how it is cut short.

Facts of other people's code, so they are data: a change of a network is a list of `Change`, which is both applied to
the module and printed in a model card as the line of Python that repeats it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

Step = nn.Module | Callable[[Tensor], Tensor]


class Change(NamedTuple):
    """Put `value` at `path` of a network; a number keeps only that many children of the module that is there."""

    path: str
    value: nn.Module | int


class Part(NamedTuple):
    """One stage: its name, what it does in order, and parameters that no module in `steps` owns."""

    name: str
    steps: Sequence[Step]
    parameters: Sequence[nn.Parameter] = ()


class Layout(NamedTuple):
    """A network as stages; `tail` turns the last kept stage's output into `[batch, d]` and belongs to that stage."""

    body: list[Part]
    tail: list[Step]


@dataclass(frozen=True)
class Family:
    """What is common to the networks of one torchvision class."""

    kind: str  # "convolutional", "vit" (plain, one class token) or "hierarchical" (windows, pooled)
    layout: Callable[[Any], Layout]
    head: str  # path of the last layer, the one that knows the classes
    first: str  # path of the convolution that sees the image
    cut: Callable[[Any, int, int], list[Change]]  # (model, stages kept, channels there) -> changes
    cut_head: str | None = None  # path of the head in a network cut short, where it differs
    pools: tuple[str, ...] | None = None  # of the stem, dropped by `stem: small`; None: the family has no small stem
    bias: bool = True  # whether the head has one
    options: Callable[[int], dict[str, Any]] = lambda _image_size: {}  # arguments of the constructor
    multiple: Callable[[Any], int] = lambda _model: 1  # what the image size must be a multiple of


def _flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


def _global_pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, (1, 1))


def _mean(x: Tensor) -> Tensor:
    return x.mean([2, 3])


def _groups(features: nn.Sequential, last: Callable[[nn.Module], bool]) -> list[Part]:
    """Split a Sequential into stages, each ending with a child for which `last` is true."""
    parts: list[Part] = []
    group: list[Step] = []
    for child in features:
        group.append(child)
        if last(child):
            parts.append(Part(f"stage{len(parts)}", group))
            group = []
    if group:
        parts.append(Part(f"stage{len(parts)}", group))
    return parts


def _children_kept(parts: list[Part], stages: int) -> int:
    return sum(len(part.steps) for part in parts[:stages])


def _every(_child: nn.Module) -> bool:
    return True


def _pool(child: nn.Module) -> bool:
    return isinstance(child, nn.MaxPool2d)


# Plain stacks: AlexNet, VGG. Their hidden linear layers are a stage of their own.
def _stack_layout(model: Any) -> Layout:
    body = _groups(model.features, _pool)
    tail: list[Step] = [model.avgpool, _flatten, model.classifier]
    if isinstance(model.classifier, nn.Sequential):
        return Layout([*body, Part("classifier", tail)], [])
    return Layout(body, tail)


def _stack_cut(model: Any, stages: int, _channels: int) -> list[Change]:
    return [
        Change("features", _children_kept(_groups(model.features, _pool), stages)),
        Change("avgpool", nn.AdaptiveAvgPool2d(1)),
        Change("classifier", nn.Identity()),
    ]


def _squeezenet_layout(model: Any) -> Layout:
    return Layout(_groups(model.features, _pool), [model.classifier, _flatten])


def _squeezenet_cut(model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("features", _children_kept(_groups(model.features, _pool), stages))]


def _resnet_layout(model: Any) -> Layout:
    body = [Part("stem", [model.conv1, model.bn1, model.relu, model.maxpool])]
    body += [Part(name, [getattr(model, name)]) for name in ("layer1", "layer2", "layer3", "layer4")]
    return Layout(body, [model.avgpool, _flatten, model.fc])


def _resnet_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change(f"layer{number}", nn.Identity()) for number in range(stages, 5)]


def _regnet_layout(model: Any) -> Layout:
    body = [Part("stem", [model.stem])]
    body += [Part(name, [block]) for name, block in model.trunk_output.named_children()]
    return Layout(body, [model.avgpool, _flatten, model.fc])


def _regnet_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("trunk_output", stages - 1)]


def _densenet_layout(model: Any) -> Layout:
    parts: list[Part] = []
    group: list[Step] = []
    for name, child in model.features.named_children():
        group.append(child)
        if name in ("pool0", "norm5") or name.startswith("transition"):
            parts.append(Part(f"stage{len(parts)}", group))
            group = []
    return Layout(parts, [F.relu, _global_pool, _flatten, model.classifier])


def _densenet_cut(model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("features", _children_kept(_densenet_layout(model).body, stages))]


def _features_layout(model: Any) -> Layout:
    """MobileNetV2, EfficientNet: every child of `features` is a stage, dropout alone follows."""
    pool = getattr(model, "avgpool", _global_pool)
    return Layout(_groups(model.features, _every), [pool, _flatten, model.classifier])


def _features_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("features", stages)]


def _mobilenet3_layout(model: Any) -> Layout:
    body = _groups(model.features, _every)
    tail: list[Step] = [model.avgpool, _flatten, model.classifier]
    if isinstance(model.classifier, nn.Sequential):
        return Layout([*body, Part("classifier", tail)], [])
    return Layout(body, tail)


def _mobilenet3_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("features", stages), Change("classifier", nn.Identity())]


def _mnasnet_layout(model: Any) -> Layout:
    layers = list(model.layers)
    body = [Part("stem", layers[:8])] + [Part(f"stage{n}", [layers[7 + n]]) for n in range(1, 7) if 7 + n < len(layers)]
    if len(layers) > 14:
        body.append(Part("stage7", layers[14:]))
    return Layout(body, [_mean, model.classifier])


def _mnasnet_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("layers", 7 + stages)]


def _shufflenet_layout(model: Any) -> Layout:
    body = [Part("stem", [model.conv1, model.maxpool])]
    body += [Part(name, [getattr(model, name)]) for name in ("stage2", "stage3", "stage4", "conv5")]
    return Layout(body, [_mean, model.fc])


def _shufflenet_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change(name, nn.Identity()) for name in ("stage2", "stage3", "stage4", "conv5")[stages - 1 :]]


_GOOGLENET = {
    "stem": ("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
    "inception3": ("inception3a", "inception3b", "maxpool3"),
    "inception4": ("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    "inception5": ("inception5a", "inception5b"),
}
_INCEPTION = {
    "stem": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    "stem2": ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    "mixed5": ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    "mixed6": ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    "mixed7": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}


def _named_layout(groups: dict[str, tuple[str, ...]]) -> Callable[[Any], Layout]:
    def layout(model: Any) -> Layout:
        body = [Part(name, [getattr(model, child) for child in children]) for name, children in groups.items()]
        return Layout(body, [model.avgpool, *_after_inception(model)])

    return layout


def _after_inception(model: Any) -> list[Step]:
    # Inception drops before it flattens, GoogLeNet after: the same numbers, but other random draws.
    if isinstance(model, tv.Inception3):
        return [model.dropout, _flatten, model.fc]
    return [_flatten, model.dropout, model.fc]


def _named_cut(groups: dict[str, tuple[str, ...]]) -> Callable[[Any, int, int], list[Change]]:
    def cut(_model: Any, stages: int, _channels: int) -> list[Change]:
        return [Change(child, nn.Identity()) for children in list(groups.values())[stages:] for child in children]

    return cut


# ConvNeXt and Swin: patches, then blocks, each further pair is (downsampling, blocks).
def _paired(features: nn.Sequential) -> list[Part]:
    children = list(features)
    parts = (
        [Part("stem", children[:1]), Part("stage1", children[1:2])] if len(children) > 1 else [Part("stem", children)]
    )
    parts += [Part(f"stage{n // 2 + 1}", children[n : n + 2]) for n in range(2, len(children), 2)]
    return parts


def _convnext_layout(model: Any) -> Layout:
    return Layout(_paired(model.features), [model.avgpool, model.classifier])


def _convnext_cut(model: Any, stages: int, channels: int) -> list[Change]:
    norm = LayerNorm2d(channels, eps=1e-6)
    kept = _children_kept(_paired(model.features), stages)
    return [Change("features", kept), Change("classifier", nn.Sequential(norm, nn.Flatten(1), nn.Identity()))]


def _swin_layout(model: Any) -> Layout:
    return Layout(_paired(model.features), [model.norm, model.permute, model.avgpool, model.flatten, model.head])


def _swin_cut(model: Any, stages: int, channels: int) -> list[Change]:
    kept = _children_kept(_paired(model.features), stages)
    return [Change("features", kept), Change("norm", nn.LayerNorm(channels, eps=1e-5))]


class _Embedding:
    """Patches to tokens. A class and not a closure, so that a deep copy of the network takes it along."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        tokens = self.model._process_input(x)  # [batch, patches, d]
        token = self.model.class_token.expand(tokens.shape[0], -1, -1)
        return self.model.encoder.dropout(torch.cat([token, tokens], dim=1) + self.model.encoder.pos_embedding)


def _class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def _vit_layout(model: Any) -> Layout:
    own = (model.class_token, model.encoder.pos_embedding, *model.conv_proj.parameters())
    body = [Part("embedding", [_Embedding(model)], own)]
    body += [Part(f"layer{number}", [layer]) for number, layer in enumerate(model.encoder.layers)]
    return Layout(body, [model.encoder.ln, _class_token, model.heads])


def _vit_cut(_model: Any, stages: int, _channels: int) -> list[Change]:
    return [Change("encoder.layers", stages - 1)]


def _maxvit_layout(model: Any) -> Layout:
    body = [Part("stem", [model.stem])] + [Part(f"block{n}", [block]) for n, block in enumerate(model.blocks)]
    if any(isinstance(child, nn.Tanh) for child in model.classifier):
        return Layout([*body, Part("classifier", [model.classifier])], [])
    return Layout(body, [model.classifier])


def _maxvit_cut(_model: Any, stages: int, channels: int) -> list[Change]:
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(channels), nn.Identity())
    return [Change("blocks", stages - 1), Change("classifier", tail)]


AUXILIARY = re.compile(r"(aux\d|AuxLogits)\.")


def _no_aux(_image_size: int) -> dict[str, Any]:
    # Auxiliary heads train against the classes, so a backbone without a head has none.
    return {"aux_logits": False, "init_weights": True}


FAMILIES: dict[type[nn.Module], Family] = {
    tv.AlexNet: Family("convolutional", _stack_layout, "classifier.6", "features.0", _stack_cut, "classifier"),
    tv.VGG: Family("convolutional", _stack_layout, "classifier.6", "features.0", _stack_cut, "classifier"),
    tv.SqueezeNet: Family(
        "convolutional", _squeezenet_layout, "classifier.1", "features.0", _squeezenet_cut, pools=("features.2",)
    ),
    tv.ResNet: Family("convolutional", _resnet_layout, "fc", "conv1", _resnet_cut, pools=("maxpool",)),
    tv.RegNet: Family("convolutional", _regnet_layout, "fc", "stem.0", _regnet_cut, pools=()),
    tv.DenseNet: Family(
        "convolutional", _densenet_layout, "classifier", "features.conv0", _densenet_cut, pools=("features.pool0",)
    ),
    tv.EfficientNet: Family(
        "convolutional", _features_layout, "classifier.1", "features.0.0", _features_cut, pools=()
    ),
    tv.MobileNetV2: Family("convolutional", _features_layout, "classifier.1", "features.0.0", _features_cut, pools=()),
    tv.MobileNetV3: Family(
        "convolutional", _mobilenet3_layout, "classifier.3", "features.0.0", _mobilenet3_cut, "classifier", pools=()
    ),
    tv.MNASNet: Family("convolutional", _mnasnet_layout, "classifier.1", "layers.0", _mnasnet_cut, pools=()),
    tv.ShuffleNetV2: Family(
        "convolutional", _shufflenet_layout, "fc", "conv1.0", _shufflenet_cut, pools=("maxpool",)
    ),
    tv.GoogLeNet: Family(
        "convolutional", _named_layout(_GOOGLENET), "fc", "conv1.conv", _named_cut(_GOOGLENET),
        pools=("maxpool1",), options=_no_aux,
    ),
    tv.Inception3: Family(
        "convolutional", _named_layout(_INCEPTION), "fc", "Conv2d_1a_3x3.conv", _named_cut(_INCEPTION), options=_no_aux
    ),
    tv.ConvNeXt: Family("convolutional", _convnext_layout, "classifier.2", "features.0.0", _convnext_cut, pools=()),
    tv.SwinTransformer: Family("hierarchical", _swin_layout, "head", "features.0.0", _swin_cut),
    tv.VisionTransformer: Family(
        "vit", _vit_layout, "heads.head", "conv_proj", _vit_cut,
        options=lambda image_size: {"image_size": image_size}, multiple=lambda model: int(model.patch_size),
    ),
    tv.MaxVit: Family(
        "hierarchical", _maxvit_layout, "classifier.5", "stem.0.0", _maxvit_cut, "classifier.3", bias=False,
        options=lambda image_size: {"input_size": (image_size, image_size)},
        # Four halvings after the stem's, and windows of `partition_size` must fit the smallest map.
        multiple=lambda model: 2 ** (1 + len(model.blocks)) * int(model.partition_size),
    ),
}  # fmt: skip
