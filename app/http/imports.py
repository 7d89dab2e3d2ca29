"""What is said of weights that come in: the fields of the form, read and checked before any byte is kept."""

import json
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from app.domain.errors import Detail
from app.domain.recipes import Architectures, architecture, refuse
from app.domain.spec import Architecture, Name, Strict

Tags = Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=32)]
Description = Annotated[str, Field(max_length=10_000)]
Numbers = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=3)]
Width = Annotated[int, Field(ge=1, le=16384)]


class Head(Strict):
    """The layers after the backbone, where there is more than a linear one."""

    hidden: Annotated[list[Width], Field(max_length=8)] = []  # noqa: RUF012
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"


class ModelImport(Strict):
    """What is said of the weights that come in; they are checked against it."""

    name: Name
    architecture: Architecture
    classes: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=100_000)] = []  # noqa: RUF012
    head: Head | None = None
    channels: Literal[1, 3] = 3
    mean: Numbers | None = None
    std: Numbers | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    tags: Tags = []  # noqa: RUF012
    description: Description = ""


FIELDS = frozenset(ModelImport.model_fields)
_JSON = frozenset({"architecture", "classes", "head", "mean", "std", "tags", "channels"})
MULTIPART = {
    "type": "object", "required": ["file", "name", "architecture"], "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "A safetensors file."},
        "name": {"type": "string", "minLength": 1, "maxLength": 200},
        "architecture": {"type": "string", "description": 'A name, or JSON: `{"architecture": "resnet18", …}`.'},
        "classes": {"type": "string", "description": "A JSON list of names; left out for a backbone without a head."},
        "head": {"type": "string", "description": 'JSON, for more than a linear head: `{"hidden": [64]}`.'},
        "channels": {"type": "string", "enum": ["1", "3"]},
        "mean": {"type": "string", "description": "A JSON list of one number per channel."},
        "std": {"type": "string", "description": "A JSON list of one number per channel."},
        "interpolation": {"type": "string", "enum": ["nearest", "bilinear", "bicubic"]},
        "tags": {"type": "string", "description": "A JSON list of strings."},
        "description": {"type": "string", "maxLength": 10_000},
    },
}  # fmt: skip
_HINTS = {
    "architecture": 'a name, or an object such as {"architecture": "resnet18"}.',
    "classes": 'a list of names, such as ["cat", "dog"].',
    "head": 'an object, such as {"hidden": [64]}.',
    "mean": "a list of numbers, such as [0.5, 0.5, 0.5].",
    "std": "a list of numbers, such as [0.25, 0.25, 0.25].",
    "tags": 'a list of strings, such as ["cats"].',
    "channels": "1 or 3.",
}


def read(fields: dict[str, str]) -> ModelImport:
    """Read the text fields of a form as the JSON that they stand for."""
    values: dict[str, Any] = dict(fields)
    for name in _JSON & set(fields):
        if name == "architecture" and not fields[name].lstrip().startswith("{"):
            values[name] = {"architecture": fields[name]}
            continue
        try:
            values[name] = json.loads(fields[name])
            _refuse_what_no_database_stores(values[name])
        except (ValueError, RecursionError) as error:
            raise refuse([Detail(pointer=f"/{name}", message=f"Send JSON: {_HINTS[name]}")]) from error
    try:
        return ModelImport.model_validate(values)
    except ValidationError as error:
        items = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        raise RequestValidationError(items, body=values) from error


def _refuse_what_no_database_stores(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    text.encode()  # a lone surrogate cannot be encoded, which is a ValueError
    if "\\u0000" in text:
        raise ValueError("a NUL character")


def check(asked: ModelImport, architectures: Architectures) -> Architecture:
    """Check the network that the weights are said to belong to, before their bytes are kept; give it with defaults.

    Raises:
        Invalid: with a detail for what to correct.
    """
    if asked.architecture.weights is not None:
        message = "Leave this out: the file has the weights."
        raise refuse([Detail(pointer="/architecture/weights", message=message)])
    for field in ("mean", "std"):
        given = getattr(asked, field)
        if given is not None and len(given) != asked.channels:
            raise refuse([Detail(pointer=f"/{field}", message=f"Give {asked.channels} numbers, one per channel.")])
    if asked.std is not None and min(asked.std) <= 0:
        raise refuse([Detail(pointer="/std", message="Give numbers greater than 0.")])
    return architecture(asked.architecture, architectures, at="/architecture")
