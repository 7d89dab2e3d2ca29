"""What is published of every architecture: its facts and the JSON Schema of its options.

What has to be measured (parameters, stages, the smallest image) is kept in `architectures.json`, made by
`python -m worker.parts.architectures` for one release of torchvision; with another release it is measured on the way.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import torch
import torchvision.models as tv

from app.domain.errors import UserFault
from worker.parts.backbones import build_backbone, names, stages
from worker.parts.small_networks import ACTIVATIONS, SMALL
from worker.parts.stock_networks import family_of, meta_parameters
from worker.parts.weights import weight_names

_FILE = Path(__file__).with_suffix(".json")
_LARGEST = 1024
_PATCHES = (2, 4, 8, 16)
_DEEPEST = 48
_DEFAULT = ("DEFAULT",)  # torchvision's own name for the best it has
_HEADS = (1, 2, 3, 4, 6, 8, 12, 16)


@cache
def facts() -> list[dict[str, Any]]:
    """Give one row for every architecture: `{"name", "facts"}`.

    The facts are family (convolutional, mlp, vit, hierarchical), stages and stage_names, stages_from (the option that
    changes their number: the length of `hidden`, or `depth` and one for the embedding), patch (the image size must be a
    multiple of it; null: any), min_image_size (with the standard stem), min_image_size_small_stem (null: it has none),
    channels, parameters (of the backbone for three channels), dimension (of its features) and schema (of the job's
    `model` object).
    """
    measured = _measured()
    return [{"name": name, "facts": _row(name, measured[name])} for name in names()]


def check(architecture: Mapping[str, Any]) -> None:
    """Hold a job's `model` object against the published schema of its architecture.

    Raises:
        UserFault: an option is unknown or out of its range; the message names it.
    """
    name = architecture["architecture"]
    schema = next((row["facts"]["schema"] for row in facts() if row["name"] == name), None)
    if schema is None:
        raise UserFault(f"model/architecture: there is no {name!r}.", code="unknown_architecture")
    for error in jsonschema.Draft202012Validator(schema).iter_errors(dict(architecture)):
        where = "/".join(["model", *(str(part) for part in error.absolute_path)])
        raise UserFault(f"{where}: {error.message} ({name}).", code="invalid_architecture")


def _measured() -> dict[str, dict[str, Any]]:
    stored = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    if stored.get("torchvision") == _torchvision_release():
        return stored["architectures"]
    return measure()


def _torchvision_release() -> str:
    return version("torchvision").partition("+")[0]


def measure() -> dict[str, dict[str, Any]]:
    """Build every architecture without memory and try how small an image it takes."""
    return {name: measure_one(name) for name in names()}


def measure_one(name: str) -> dict[str, Any]:
    """Measure one architecture: parameters, dimension, stages, smallest image with the standard and the small stem."""
    with meta_parameters():
        smallest = _smallest(name, "standard")
        backbone = build_backbone({"architecture": name}, channels=3, image_size=smallest, seed=0)
        small_stem = _smallest(name, "small") if has_small_stem(name) else None
        usual = build_backbone({"architecture": name}, channels=3, image_size=_usual_size(name), seed=0)
    return {
        "parameters": sum(parameter.numel() for parameter in usual.parameters()),
        "dimension": backbone.dimension,
        "stages": [stage for stage, _ in stages(backbone)],
        "min_image_size": smallest,
        "min_image_size_small_stem": small_stem,
    }


def has_small_stem(name: str) -> bool:
    """Say whether `stem: small` means anything for this architecture."""
    return name not in SMALL and family_of(name).pools is not None


def _usual_size(name: str) -> int:
    return 32 if name in SMALL else 224


def _smallest(name: str, stem: str) -> int:
    """Find the smallest image that passes, 8 pixels or more: shapes alone are computed."""
    for size in range(8, _LARGEST + 1):
        try:
            architecture = {"architecture": name, "stem": stem}
            backbone = build_backbone(architecture, channels=3, image_size=size, seed=0).to("meta").eval()
            features = backbone(torch.empty(2, 3, size, size, device="meta"))
        except (UserFault, RuntimeError, ValueError, AssertionError):
            continue
        if features.shape == (2, backbone.dimension):
            return size
    raise LookupError(f"{name} takes no image up to {_LARGEST} pixels")


def _row(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    if name in ("small_cnn", "mlp"):
        family = {"small_cnn": "convolutional", "mlp": "mlp"}[name]
    else:
        family = family_of(name).kind
    return {
        "family": family,
        "stages": len(measured["stages"]),
        "stage_names": measured["stages"],
        "stages_from": {"mlp": "hidden", "small_vit": "depth"}.get(name),
        "patch": _patch(name),
        "min_image_size": measured["min_image_size"],
        "min_image_size_small_stem": measured["min_image_size_small_stem"],
        "channels": [1, 3],
        "parameters": measured["parameters"],
        "dimension": measured["dimension"],
        "schema": _schema(name, measured),
    }


def _patch(name: str) -> int | None:
    if name == "small_vit":
        return 4
    if name.startswith("vit_"):
        return int(name.rpartition("_")[2])
    # Its windows of 7 must fit every one of five halvings.
    return 224 if name == "maxvit_t" else None


def _schema(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    published = [] if name in SMALL else weight_names(name)
    enum = tv.get_model_weights(name).__name__ if published else ""
    properties: dict[str, Any] = {
        "architecture": {"const": name},
        "weights": {
            "enum": [None, *published, *(f"{enum}.{entry}" for entry in published), *_DEFAULT[: len(published)]],
            "default": None,
            "description": "Published weights to start from; null is a random start.",
        },
        "image_size": {
            "type": ["integer", "null"], "minimum": 8, "maximum": _LARGEST, "default": None,
            "description": "Pixels a side; null takes what suits the images.",
        },
        "stem": {
            "enum": ["standard", "small"] if has_small_stem(name) else ["standard"],
            "default": "standard",
            "description": "`small`: 3x3 with stride 1 and no pool, for images of 32 pixels.",
        },
    }  # fmt: skip
    if name == "mlp":
        properties["keep_stages"] = {"type": "null", "default": None, "description": "List fewer layers instead."}
    else:
        properties["keep_stages"] = {
            "type": ["integer", "null"], "minimum": 1, "default": None,
            "maximum": _DEEPEST + 1 if name == "small_vit" else len(measured["stages"]),
            "description": "Cut the network after this many stages.",
        }  # fmt: skip
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": name, "type": "object",
        "properties": {**properties, **_own_properties(name)}, "required": ["architecture"],
        "additionalProperties": False,
    }  # fmt: skip
    return schema | _size_rules(name, measured)


def _own_properties(name: str) -> dict[str, Any]:
    if name == "small_cnn":
        return {
            "width": {
                "type": "number", "minimum": 0.125, "maximum": 8, "default": 1.0,
                "description": "Multiplies the channels 64, 256, 256; parameters grow with its square.",
            },
            "whitening": {
                "type": "boolean", "default": False,
                "description": "Fix the stem to the whitening filters of the training images' patches.",
            },
        }  # fmt: skip
    if name == "mlp":
        return {
            "hidden": {
                "type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 16384},
                "minItems": 1, "maxItems": 12, "default": [512, 256], "description": "Width of each layer.",
            },
            "activation": {"enum": list(ACTIVATIONS), "default": "relu", "description": "After every layer."},
        }  # fmt: skip
    if name == "small_vit":
        return {
            "patch": {"enum": list(_PATCHES), "default": 4, "description": "Pixels a side of a patch."},
            "width": {
                "type": "integer", "minimum": 16, "maximum": 2048, "default": 192, "description": "Of every token.",
            },
            "depth": {"type": "integer", "minimum": 1, "maximum": _DEEPEST, "default": 6, "description": "Layers."},
            "heads": {"enum": list(_HEADS), "default": 3, "description": "Of attention; they divide the width."},
        }  # fmt: skip
    return {}


def _size_rules(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What a smallest size or a patch demands of `image_size`, as further rules of the schema."""

    def size(**rule: int) -> dict[str, Any]:
        return {"properties": {"image_size": rule}}

    def given(key: str, value: Any) -> dict[str, Any]:
        return {"properties": {key: {"const": value}}, "required": [key]}

    if name == "small_vit":
        rules = [{"if": given("patch", patch), "then": size(multipleOf=patch)} for patch in _PATCHES] + [
            {"if": {"not": {"required": ["patch"]}}, "then": size(multipleOf=4)},
            {"if": {"not": {"required": ["depth"]}}, "then": {"properties": {"keep_stages": {"maximum": 7}}}},
            {"if": {"not": {"required": ["heads"]}}, "then": {"properties": {"width": {"multipleOf": 3}}}},
        ]
        for heads in _HEADS:
            divides: dict[str, Any] = {"properties": {"width": {"multipleOf": heads}}}
            if 192 % heads:
                divides["required"] = ["width"]
            rules.append({"if": given("heads", heads), "then": divides})
        return {"allOf": rules}
    if patch := _patch(name):
        return {"allOf": [size(multipleOf=patch)]}
    least = size(minimum=measured["min_image_size"])
    if measured["min_image_size_small_stem"] is None:
        return {"allOf": [least]}
    small = size(minimum=measured["min_image_size_small_stem"])
    return {"allOf": [{"if": given("stem", "small"), "then": small, "else": least}]}


def main() -> None:
    """Measure every architecture and write the file."""
    made = {"torchvision": _torchvision_release(), "architectures": measure()}
    lines = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in made["architectures"].items()]
    body = ",\n".join(lines)
    _FILE.write_text(
        f'{{\n  "torchvision": {json.dumps(made["torchvision"])},\n  "architectures": {{\n{body}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    main()
