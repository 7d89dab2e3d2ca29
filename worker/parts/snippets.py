"""The lines of Python that rebuild a network without this project; they stand in its model card."""

from typing import Any

from torch import nn
from torchvision.models.convnext import LayerNorm2d

from app.domain.models import ModelConfig
from worker.parts.backbones import blueprint
from worker.parts.families import Change
from worker.parts.heads import without_dropout
from worker.parts.networks import Network, assemble
from worker.parts.stock_networks import meta_parameters

LINES = 25


def loading_snippet(config: ModelConfig) -> str:
    """Write what loads `model.safetensors` from the working directory into `model`, in at most 25 lines.

    An unmodified torchvision architecture takes three lines after the imports (MNASNet five).
    """
    with meta_parameters():
        network = assemble(config)
    if config.architecture["architecture"] in ("small_cnn", "mlp"):
        return _sequential(network)
    return _torchvision(config, network)


def _torchvision(config: ModelConfig, network: Network) -> str:
    constructor, options, changes, dimension = blueprint(
        config.architecture, channels=config.channels, image_size=config.image_size
    )
    path = str(network.backbone.head_path)
    head = None if network.head is None else without_dropout(network.head)
    stock = not any(f"{path}.".startswith(f"{change.path}.") for change in changes)
    linear = isinstance(head, nn.Linear) and head.in_features == dimension
    if linear and stock and not constructor.startswith("squeezenet"):
        options = {"num_classes": len(config.classes), **options}
    else:
        changes = [*changes, Change(path, head or nn.Identity())]
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    last = {change.path: change for change in changes}
    made = [
        f"model = torchvision.models.{constructor}({arguments})",
        *(_assignment(change) for change in last.values()),
    ]
    imports = ["import safetensors.torch", *(["import torch"] if last else []), "import torchvision", ""]
    if constructor.startswith("mnasnet"):
        return "\n".join(["from collections import OrderedDict", "", *imports, *made, *_LOAD_MNASNET])
    return "\n".join([*imports, *made, *_LOAD])


_LOAD = ['model.load_state_dict(safetensors.torch.load_file("model.safetensors"))', "model.eval()"]

# The loader of this one class insists on a version, which safetensors has no place for.
_LOAD_MNASNET = [
    'weights = OrderedDict(safetensors.torch.load_file("model.safetensors"))',
    'weights._metadata = {"": {"version": 2}}  # MNASNet asks for it',
    "model.load_state_dict(weights)",
    "model.eval()",
]


def _assignment(change: Change) -> str:
    target = "model"
    for name in change.path.split("."):
        target += f"[{name}]" if name.isdigit() else f".{name}"
    if isinstance(change.value, int):
        return f"{target} = {target}[:{change.value}]"
    return f"{target} = {code(change.value, 'torch.nn')}"


def _sequential(network: Network) -> str:
    layers: dict[str, nn.Module] = dict(network.backbone.named_children())
    if network.head is not None:
        layers["head"] = without_dropout(network.head)
    listed = [f"    {name}={code(layer, 'nn')}," for name, layer in layers.items()]
    head = ["from collections import OrderedDict", "", "import safetensors.torch", "from torch import nn", ""]
    return "\n".join([*head, "model = nn.Sequential(OrderedDict(", *listed, "))", *_LOAD])


def code(module: nn.Module, prefix: str) -> str:
    """Write the expression that makes a layer, without what is a default: torch's own print names newer arguments."""
    match module:
        case nn.Sequential():
            return f"{prefix}.Sequential({', '.join(code(child, prefix) for child in module)})"
        case nn.Conv2d():
            options = {"stride": (module.stride, (1, 1)), "padding": (module.padding, (0, 0))}
            given = "".join(f", {name}={_one(value)}" for name, (value, usual) in options.items() if value != usual)
            bias = "" if module.bias is not None else ", bias=False"
            arguments = f"{module.in_channels}, {module.out_channels}, {_one(module.kernel_size)}{given}{bias}"
        case nn.Linear():
            arguments = (
                f"{module.in_features}, {module.out_features}{'' if module.bias is not None else ', bias=False'}"
            )
        case nn.BatchNorm2d():
            arguments = f"{module.num_features}"
        case LayerNorm2d():
            return f"torchvision.models.convnext.LayerNorm2d({module.normalized_shape}, eps={module.eps})"
        case nn.LayerNorm():
            arguments = f"{module.normalized_shape}, eps={module.eps}"
        case nn.MaxPool2d():
            arguments = f"{_one(module.kernel_size)}{', ceil_mode=True' if module.ceil_mode else ''}"
        case nn.AdaptiveAvgPool2d():
            arguments = f"{module.output_size}"
        case nn.Dropout():
            arguments = f"{module.p}"
        case nn.Flatten() | nn.Identity() | nn.ReLU() | nn.GELU() | nn.SiLU() | nn.Tanh():
            arguments = ""
        case _:
            raise TypeError(f"no way is known to write a {type(module).__name__}")
    return f"{prefix}.{type(module).__name__}({arguments})"


def _one(size: Any) -> Any:
    """A square is written as one number."""
    return size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size


def input_snippet(config: ModelConfig) -> str:
    """Write what turns an image file into the input of `model`."""
    mode = "L" if config.channels == 1 else "RGB"
    wide = "GRAY" if config.channels == 1 else "RGB"
    size, interpolation = config.image_size, config.interpolation.upper()

    def column(values: tuple[float, ...]) -> str:
        return f"torch.tensor({[float(f'{value:.9g}') for value in values]}).view(-1, 1, 1)"

    if config.bits == 16:  # which Pillow cannot read in colour
        lines = [
            "import torch",
            "from torchvision.io import ImageReadMode, decode_image",
            "from torchvision.transforms.v2 import InterpolationMode, functional",
            "",
            f'image = decode_image("image.png", ImageReadMode.{wide})',
            "image = functional.to_dtype(image, torch.float32, scale=True)",
            f"image = functional.resize(image, [{size}, {size}], InterpolationMode.{interpolation}, antialias=True)",
            f"x = (image - {column(config.mean)}) / {column(config.std)}",
            "output = model(x[None])",
        ]
        return "\n".join(lines)
    lines = [
        "import torch",
        "from PIL import Image",
        "from torchvision.transforms.v2 import InterpolationMode, functional",
        "",
        f'image = functional.pil_to_tensor(Image.open("image.png").convert("{mode}"))',
        f"image = functional.resize(image, [{size}, {size}], InterpolationMode.{interpolation}, antialias=True)",
        f"x = (image / 255 - {column(config.mean)}) / {column(config.std)}",
        "output = model(x[None])",
    ]
    return "\n".join(lines)
