"""What a dataset is: its formats, its tasks, and the facts of it that a job and a trainer need. Pure."""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

DatasetTask = Literal["image_classification", "unlabelled_images"]
OnError = Literal["skip", "fail"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# `digits` comes with scikit-learn and needs no network; the others are fetched by torchvision.
Builtin = Literal[
    "digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn", "stl10"
]  # fmt: skip


class DatasetStatus(StrEnum):
    """Where a dataset is."""

    PROCESSING = "processing"
    READY = "ready"
    FAILED = "failed"


class Shard(BaseModel):
    """One Arrow IPC stream file of a split; the thumbnails of its rows lie beside it, row for row."""

    model_config = ConfigDict(frozen=True)

    split: Split
    index: int
    rows: int
    sha256: str
    bytes: int
    thumbnails_sha256: str | None = None
    thumbnails_bytes: int = 0
    path: str | None = None  # where the supervisor staged it, for the trainer
    thumbnails_path: str | None = None  # where ingest left it in scratch, for the supervisor


class DatasetFacts(BaseModel):
    """What a trainer is told of a dataset; everything but the pixels."""

    model_config = ConfigDict(frozen=True)

    id: str
    sha256: str  # over the digests of the shards, in order: the dataset's identity for every cache
    task: str
    classes: tuple[str, ...]
    splits: dict[str, int]
    features: dict[str, str]
    labelled: dict[str, int]  # rows with a label, by split
    image_sizes: dict[str, int]  # "min_height", "max_height", "min_width", "max_width"
    channels: int
    bits: int = 8  # of a channel: 16 where any image has that many
    shards: tuple[Shard, ...]
