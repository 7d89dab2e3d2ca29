"""Import of a model: somebody's safetensors, checked against the architecture that they name.

`order.spec` is `{"model": {"architecture": …, "image_size": …}, "classes": [names], "head": null or {"hidden",
"activation"}, "channels", "mean", "std", "interpolation", "name"}`; all but `model` may be left out. Nothing is ever
unpickled: a file that is not safetensors is refused by its first bytes.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from app.domain.errors import DataFault, UserFault
from app.domain.models import ModelConfig
from app.domain.spec import Architecture, Strict
from worker.parts.backbones import SMALL, build_backbone, names
from worker.parts.export import Card, export
from worker.parts.families import AUXILIARY
from worker.parts.networks import assemble, head_of, load_state, named_state
from worker.parts.stock_networks import meta_parameters
from worker.parts.weights import differences, normalisation
from worker.recipe import Width
from worker.report import MadeModel, Order, Reporter

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
_NAMED = 5  # of many bad tensors
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_ZIP, _PICKLE, _HDF5 = b"PK\x03\x04", b"\x80", b"\x89HDF"

ClassName = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class HeadOptions(Strict):
    """Layers after the backbone, where the imported network has more than a linear one."""

    hidden: Annotated[tuple[Width, ...], Field(max_length=8)] = ()
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"


class ModelImport(Strict):
    """What the uploader says of the weights."""

    model: Architecture
    classes: Annotated[tuple[ClassName, ...], Field(max_length=100_000)] = ()
    head: HeadOptions | None = None
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    name: str = "imported model"


def run(order: Order, reporter: Reporter) -> MadeModel:
    """Check the staged upload and write it out again as a model of ours.

    Raises:
        UserFault: the description is impossible, or the weights are another network's; names keys and shapes.
        DataFault: the file is no safetensors file, is damaged, too large a header, or holds values that are not finite.
    """
    wanted = _described(order.spec)
    assert order.upload is not None
    path, name = Path(order.upload), order.upload_name or "model.safetensors"
    check_header(path, name)
    state = _read(path, name)
    config = _config(wanted, state, name)
    network = assemble(config)
    load_state(network, state, source=name)
    reporter.event("model.imported", f"{name}: {len(state)} tensors fit {config.architecture['architecture']}.")
    card = Card(wanted.name, {"source": f"imported from {name}"})
    return export(Path(order.scratch), network.backbone, network.head, config=config, card=card, metrics={})


def _described(spec: Mapping[str, Any]) -> ModelImport:
    try:
        return ModelImport.model_validate_json(json.dumps(spec))
    except ValidationError as error:
        first = error.errors()[0]
        field = "/".join(str(part) for part in first["loc"])
        raise UserFault(f"{field}: {first['msg']}", code="invalid_import") from error


def check_header(path: Path, name: str) -> None:
    """Look at the header of a safetensors file before any library parses it.

    Raises:
        DataFault: it is something else, is cut off, or its header is larger than any network needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith((_ZIP, _PICKLE, _HDF5)):
            raise DataFault(
                f"{name} is a pickle, zip or HDF5 file, and those are never opened here.", code="not_safetensors",
                hint="Save the weights with safetensors.torch.save_file(model.state_dict(), 'model.safetensors').",
            )  # fmt: skip
        if len(start) < 8:
            raise DataFault(f"{name} has {size} bytes and is no safetensors file.", code="not_safetensors")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise DataFault(
                f"{name} announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are read. "
                "It is no safetensors file, or a damaged one.",
                code="header_too_large",
            )
        if length > size - 8:
            raise DataFault(f"{name} is cut off: its header alone needs {length + 8} bytes.", code="truncated")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataFault(
            f"The header of {name} is not JSON: it is no safetensors file.", code="not_safetensors"
        ) from error
    if not isinstance(header, dict):
        raise DataFault(f"The header of {name} is not an object: it is no safetensors file.", code="not_safetensors")
    if len(header) > MAX_TENSORS:
        raise DataFault(f"{name} lists {len(header)} tensors; at most {MAX_TENSORS} are read.", code="too_many_tensors")


def _read(path: Path, name: str) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataFault(f"{name} is not a valid safetensors file: {error}", code="not_safetensors") from error
    if not state:
        raise DataFault(f"{name} holds no tensors.", code="no_tensors")
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise DataFault(
            f"{name} holds values that are not finite in {', '.join(bad[:_NAMED])}{more}.", code="not_finite",
            hint="Export the weights again from a checkpoint before the training diverged.",
        )  # fmt: skip
    # Networks are built in float32; half precision loses nothing by it.
    return {key: value.float() if value.dtype in _FLOATS else value for key, value in state.items()}


def _config(wanted: ModelImport, state: dict[str, Tensor], name: str) -> ModelConfig:
    """Compare the weights with the named architecture, and describe the network that they make.

    Adjusts `state` where torchvision stores the same layer in another way.
    """
    architecture = wanted.model.model_dump(exclude_none=True)
    known = architecture["architecture"] in names() and architecture["architecture"] not in SMALL
    image_size = wanted.model.image_size or (224 if known else 32)
    with meta_parameters():
        backbone = build_backbone(
            {**architecture, "weights": None}, channels=wanted.channels, image_size=image_size, seed=0
        )
        prefix = f"{backbone.head_path}."
        for key in [key for key in state if AUXILIARY.match(key)]:
            del state[key]  # heads that only training uses
        for key in [key for key in state if key.startswith(prefix) and state[key].shape[2:] == (1, 1)]:
            state[key] = state[key].flatten(1)  # a 1x1 convolution on pooled features, as SqueezeNet has it
        classes = _classes(wanted, state, prefix, name)
        options = wanted.head.model_dump(mode="json") if wanted.head and classes else None
        head = head_of(backbone, len(classes), options) if classes else None
        if problems := differences(named_state(backbone, head), state):
            raise UserFault(
                f"{name} does not fit {architecture['architecture']}: {'; '.join(problems)}.", code="weights_do_not_fit"
            )
    mean, std = normalisation(architecture["architecture"], wanted.channels) if known else ((0.5,), (0.5,))
    mean, std = wanted.mean or mean, wanted.std or std
    if not known:
        mean, std = (values * wanted.channels if len(values) == 1 else values for values in (mean, std))
    if len(mean) != wanted.channels or len(std) != wanted.channels:
        raise UserFault(f"mean and std need {wanted.channels} numbers each, one per channel.", code="normalisation")
    return ModelConfig(
        architecture=architecture,
        task="image_classification" if classes else "unlabelled_images",
        classes=classes,
        head=options,
        image_size=image_size,
        channels=wanted.channels,
        interpolation=wanted.interpolation,
        mean=mean,
        std=std,
    )


def _classes(wanted: ModelImport, state: Mapping[str, Tensor], prefix: str, name: str) -> tuple[str, ...]:
    """Name what the head of the file tells apart; nothing where it has none."""
    weights = [key for key, value in state.items() if key.startswith(prefix) and value.dim() == 2]
    if not weights:
        if wanted.classes:
            raise UserFault(
                f"{name} has no head (nothing is called {prefix}*), so it cannot tell {len(wanted.classes)} classes "
                "apart: leave `classes` out to import a backbone.",
                code="no_head",
            )
        return ()
    outputs = len(state[max(weights, key=_layer_number)])
    classes = wanted.classes or tuple(str(number) for number in range(outputs))
    if len(classes) != outputs:
        raise UserFault(
            f"The head of {name} gives {outputs} outputs, and `classes` names {len(classes)}: give one name for each.",
            code="classes",
        )
    return classes


def _layer_number(key: str) -> tuple[int, ...]:
    return tuple(int(part) for part in key.split(".") if part.isdigit())
