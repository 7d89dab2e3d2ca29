"""What a model is: an immutable trained artefact with its lineage. Pure."""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class ModelStatus(StrEnum):
    """Where a model is; only an import is ever `processing`."""

    PROCESSING = "processing"
    READY = "ready"
    FAILED = "failed"


class ModelConfig(BaseModel):
    """`config.json`: everything needed to build the network again and to feed it.

    `architecture` is the object that built it (`{"architecture": "resnet18", "stem": "small", …}`); `classes` is empty
    for a backbone without a head. An image enters as float32 in [0, 1], resized to `image_size` with `interpolation`,
    then `(x - mean) / std` per channel; `bits` is how many each channel of the training images had, 8 or 16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: dict[str, Any]
    task: str
    classes: tuple[str, ...] = ()
    head: dict[str, Any] | None = None
    image_size: int
    channels: int = 3
    bits: int = 8
    interpolation: str = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
