"""Small networks of our own for small images, written with plain torch layers so that a few lines rebuild them."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.domain.errors import UserFault

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
SMALL = ("small_cnn", "mlp", "small_vit")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "small_cnn": {"width": 1.0, "whitening": False},
    "mlp": {"hidden": (512, 256), "activation": "relu"},
    "small_vit": {"patch": 4, "width": 192, "depth": 6, "heads": 3},
}
_WIDTHS = (64, 256, 256)


def small_network(architecture: Mapping[str, Any], *, channels: int, image_size: int) -> nn.Module:
    """Build a small_cnn or an mlp by its options; `keep_stages` cuts a small_cnn short."""
    name = architecture["architecture"]
    options = own_options(architecture)
    refuse_weights(architecture)
    if name == "small_cnn":
        network = small_cnn(channels=channels, image_size=image_size, **options)
        *blocks, pool, _ = network.named_children()
        keep = architecture.get("keep_stages")
        check_keep(name, keep, len(blocks))
        if keep is not None and keep < len(blocks):
            for dropped, _ in blocks[keep:]:
                setattr(network, dropped, nn.Identity())
            setattr(network, pool[0], nn.AdaptiveAvgPool2d(1))
    else:
        if architecture.get("keep_stages") is not None:
            raise UserFault("An mlp has no keep_stages; list fewer layers in `hidden`.", code="keep_stages")
        network = mlp(channels=channels, image_size=image_size, **options)
    dimension = _last_width(network)
    return marked(network, dimension=dimension, head_path="head", keep=architecture.get("keep_stages"))


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


def refuse_weights(architecture: Mapping[str, Any]) -> None:
    """Say that nobody has published any, where they are asked for."""
    if architecture.get("weights") is not None:
        raise UserFault(f"There are no published weights for {architecture['architecture']}.", code="unknown_weights")


def check_keep(name: str, keep: int | None, most: int) -> None:
    """Refuse to keep more stages than there are."""
    if keep is not None and keep > most:
        raise UserFault(f"{name} has {most} stages; keep_stages is {keep}.", code="keep_stages")


def _last_width(network: nn.Sequential) -> int:
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    last = layers[-1]
    return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features


def marked(
    network: nn.Module, *, dimension: int, head_path: str, keep: int | None, head_bias: bool = True
) -> nn.Module:
    """Write on a backbone what others read from it."""
    # Plain attributes, so that they survive a deep copy and stay out of the state dict.
    backbone: Any = network
    backbone.dimension, backbone.keep_stages = dimension, keep
    backbone.head_path, backbone.head_bias = head_path, head_bias
    return network


def small_cnn(*, channels: int, image_size: int, width: float = 1.0, whitening: bool = False) -> nn.Sequential:
    """Build a VGG-like network of 2M parameters: a 2x2 stem, three blocks, a maximum over what is left of the map.

    After https://github.com/KellerJordan/cifar10-airbench (airbench94). Input `[batch, channels, size, size]` with
    size >= 8, output `[batch, 256 * width]`. Larger images enter through larger, strided stem patches, so that the
    first map stays near 32 x 32. `whitening` fixes the stem to the whitening filters of the data (`whiten`).
    """
    stride = max(1, image_size // 32)
    patch = 2 * stride
    filters = min(24, 2 * channels * patch**2) if whitening else 24
    stem = nn.Conv2d(channels, filters, patch, stride=stride)
    if whitening:
        stem.weight.requires_grad_(False)
    size = (image_size - patch) // stride + 1
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(stem, nn.GELU()))
    before = filters
    for number, base in enumerate(_WIDTHS, start=1):
        after = max(8, round(base * width / 8) * 8)
        # The map of a tiny image is small enough before there are many channels: pooling it in the first block as well
        # costs accuracy on 8 x 8 digits and saves little time.
        pools = number > 1 or size >= 12
        layers[f"stage{number}"] = _block(before, after, _pool(size) if pools else nn.Identity())
        if pools:
            size = -(-size // 2) if size < 4 else size // 2
        before = after
    # A maximum with a fixed window, because the adaptive one has no deterministic gradient on CUDA.
    layers["pool"] = nn.MaxPool2d(size)
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def _pool(size: int) -> nn.Module:
    return nn.MaxPool2d(2, ceil_mode=size < 4)


def _block(before: int, after: int, pool: nn.Module) -> nn.Sequential:
    # Pooling comes before the normalisation and the second convolution: both then cost a quarter.
    block = nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        pool,
        nn.BatchNorm2d(after),
        nn.GELU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.GELU(),
    )
    for convolution in (layer for layer in block if isinstance(layer, nn.Conv2d)):
        # Start near the identity, as airbench does: signal and gradient pass the whole depth from the first step.
        with torch.no_grad():
            nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return block


def mlp(*, channels: int, image_size: int, hidden: tuple[int, ...], activation: str = "relu") -> nn.Sequential:
    """Build a multi-layer perceptron on the flattened image; output `[batch, hidden[-1]]`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    before = channels * image_size**2
    for number, after in enumerate(hidden, start=1):
        layers[f"layer{number}"] = nn.Sequential(nn.Linear(before, after), ACTIVATIONS[activation]())
        before = after
    return nn.Sequential(layers)


def whiten(network: nn.Sequential, images: Tensor) -> None:
    """Set the fixed stem of a whitening `small_cnn` from normalised images `[n, channels, size, size]`.

    Its filters are the leading eigenvectors of the patches' covariance, each divided by the root of its eigenvalue,
    and their negatives (airbench94, `init_whitening_conv`).
    """
    stem = network.get_submodule("stem.0")
    assert isinstance(stem, nn.Conv2d)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        size = stem.weight[0].numel()
        total, squares, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
        # In float64, and in parts that fit the memory: what float32 gives depends on torch's matmul precision, which is
        # set after this, and a second run in one process would start from other filters than the first.
        for part in images[:5000].split(64):
            patches = F.unfold(part.float(), stem.kernel_size, stride=stem.stride)  # [n, c * k * k, places]
            patches = patches.transpose(1, 2).flatten(0, 1).double().cpu()
            total, squares, count = total + patches.sum(0), squares + patches.T @ patches, count + len(patches)
        covariance = squares / count - torch.outer(total, total) / count**2
        values, vectors = torch.linalg.eigh(covariance)
        half = stem.out_channels // 2
        leading = vectors.T.flip(0)[:half] / (values.flip(0)[:half, None] + 5e-4).sqrt()
        weight = torch.cat([leading, -leading]).reshape(stem.weight.shape)
        stem.weight.copy_(weight)
        assert stem.bias is not None
        stem.bias.zero_()


def fixed_stem(network: nn.Module) -> bool:
    """Say whether the network has a whitening stem, which `whiten` sets from data before the first step."""
    if not isinstance(network, nn.Sequential) or "stem" not in dict(network.named_children()):
        return False
    return not network.get_parameter("stem.0.weight").requires_grad
