"""The server's objects, as they stand in the HTTP contract. Additions of a newer server are kept, just not typed."""

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypedDict, TypeVar

Item = TypeVar("Item")
Json = dict[str, Any]
Spec = Mapping[str, Any]
Series = list[list[float | None]]  # of [step, value]


class Page(TypedDict, Generic[Item]):
    """One page of a list; `last_id` is the cursor to the next."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Dataset(TypedDict):
    """Immutable, validated samples."""

    id: str
    object: Literal["dataset"]
    name: str
    version: int
    status: Literal["processing", "ready", "failed"]
    task: str | None
    format: str | None
    bytes: int
    sha256: str | None
    samples: int
    splits: dict[str, int]
    features: dict[str, str]
    classes: list[str]
    report: Json | None
    progress: Json | None
    job: str | None
    error: Json | None
    created_at: str
    metadata: dict[str, str]


class Sample(TypedDict):
    """One row of a dataset; `number` counts over all splits in the order train, validation, test."""

    object: Literal["sample"]
    number: int
    split: str
    label: int | None
    path: str | None


class Job(TypedDict):
    """One run of a recipe on a dataset."""

    id: str
    object: Literal["job"]
    name: str
    recipe: str
    recipe_version: str
    kind: Literal["pretrain", "finetune", "apply", "internal"]
    dataset: str | None
    status: str
    wanted: str
    status_reason: str | None
    queue: Json | None
    progress: Json | None
    metrics: dict[str, float | None]
    best: Json | None
    model: str | None
    result: Json | None
    files: list[Json]
    parent: str | None
    children: Json
    retry_of: str | None
    attempt: int
    max_attempts: int
    exact: bool
    worker: str | None
    error: Json | None
    spec: Json
    plan: Json | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    metadata: dict[str, str]


class Event(TypedDict):
    """One numbered line of a job's log."""

    id: str
    object: Literal["event"]
    number: int
    type: Literal["status", "metric", "checkpoint", "log", "done"]
    code: str
    level: Literal["info", "warning", "error"]
    message: str
    data: Json
    attempt: int
    created_at: str


class Checkpoint(TypedDict):
    """The resumable state of a job."""

    id: str
    step: int
    epoch: int
    metrics: dict[str, float | None]
    bytes: int
    sha256: str
    best: bool


class File(TypedDict):
    """A file of a model or of a job."""

    name: str
    bytes: int
    sha256: str


class Model(TypedDict):
    """An immutable trained artefact with its lineage."""

    id: str
    object: Literal["model"]
    name: str
    version: int
    status: Literal["processing", "ready", "failed"]
    task: str | None
    architecture: Json | None
    parameters: int | None
    classes: list[str]
    metrics: dict[str, float | None]
    files: list[File]
    lineage: Json
    visibility: Literal["private", "public"]
    tags: list[str]
    error: Json | None
    created_at: str


class Recipe(TypedDict):
    """One way to train or to use a model, as a worker published it."""

    name: str
    kind: Literal["pretrain", "finetune", "apply"]
    version: str
    summary: str
    tasks: list[str]
    schema: Json
    defaults: Json
    template: Json
    requires: Json


class Key(TypedDict):
    """An API key; the secret itself is shown once, in the answer to its creation."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: str


class Project(TypedDict):
    """A wall: every object belongs to one project."""

    id: str
    name: str
    created_at: str


class Worker(TypedDict):
    """A worker process and what it offers."""

    id: str
    host: str
    slots: int
    busy: int
    gpus: list[Json]
    versions: Json
    draining: bool
    alive: bool
    started_at: str


ENDED = frozenset({"succeeded", "stopped", "failed", "cancelled"})
