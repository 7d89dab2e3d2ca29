"""What a job asks for: the body of `POST /v1/jobs`, with the defaults that every recipe shares. Pure."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, strict=True)]
Rate = Annotated[float, Field(gt=0)]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f/\\]+$")]
ModelReference = Annotated[str, StringConstraints(pattern=r"^(mdl|job)_[0-9a-z]{26}$")]


class Strict(BaseModel):
    """An unknown field is an error, and a value never changes after it was checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Architecture(BaseModel):
    """A network to start from. Each architecture's own options are checked by its published schema."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    architecture: str = Field(description="A torchvision classification model, small_cnn, mlp or small_vit.")
    weights: str | None = Field(default=None, description="A torchvision weights name, or null for a random start.")
    image_size: int | None = Field(
        default=None, ge=8, le=1024, description="Pixels a side; null takes what suits the images."
    )
    stem: Literal["standard", "small"] = Field(
        default="standard", description="`small`: 3x3 stride 1, no pool, for 32 pixels."
    )
    keep_stages: int | None = Field(default=None, ge=1, le=64, description="Cut the network after this many stages.")


class Optimizer(Strict):
    """An optimiser by its standard name."""

    name: Literal["sgd", "adam", "adamw", "muon"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1, description="For sgd and muon.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="For adam and adamw."
    )
    nesterov: bool = Field(default=False, description="For sgd and muon.")


class EarlyStopping(Strict):
    """End when a validation metric no longer improves; the best weights are restored."""

    metric: str = "validation/loss"
    patience: int = Field(default=5, ge=1, description="How often it is measured without improvement before the end.")
    min_delta: float = Field(default=0.0, ge=0)


class Training(Strict):
    """How to optimise. `auto` is resolved once, before step 0, and recorded in the plan."""

    preset: Literal["fast"] | None = Field(
        default=None,
        description="Named defaults under this body. `fast`: a good image classifier in the least time, from scratch.",
    )
    epochs: int = Field(default=10, ge=1, le=100_000)
    steps: Count | None = Field(default=None, description="Optimiser steps of the whole run, in place of `epochs`.")
    batch_size: Count | Auto = Field(default="auto", description="Samples per optimiser step, over all devices.")
    accumulate: Count | Auto = Field(default="auto", description="Micro-batches per optimiser step.")
    learning_rate: Rate | Auto = Field(default="auto", description="Peak learning rate.")
    optimizer: Optimizer | Literal["sgd", "adam", "adamw", "muon"] = Optimizer()
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    schedule: Literal["cosine", "constant", "linear", "step", "triangular"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    gradient_clip: float | None = Field(default=None, gt=0, description="Largest norm of the gradient.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: bool | Auto = "auto"
    deterministic: bool = True
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_seconds: float | None = Field(default=None, gt=0, description="Training time over all attempts.")
    early_stopping: EarlyStopping | None = None
    stop_on_collapse: bool = Field(
        default=False, description="Pretraining ends as `stopped` once its features tell samples hardly apart."
    )
    checkpoint_every: Literal["epoch"] | Count = Field(default="epoch", description="An epoch, or a number of steps.")


class Data(Strict):
    """Which part of the dataset is used, and how many of its labels."""

    validation_fraction: float = Field(
        default=0.1, ge=0, le=0.9, description="Of the kept labels, where no split is given."
    )
    label_fraction: float = Field(default=1.0, gt=0, le=1, description="Keep labels for this seeded, stratified part.")
    labels_per_class: int | None = Field(default=None, ge=1, description="Keep this many labels of each class instead.")


class Resources(Strict):
    """What the job needs of a worker."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: int = Field(default=1, ge=1, le=64)


class Spec(Strict):
    """The whole body of `POST /v1/jobs`. `params` belong to the recipe and are checked by its published schema."""

    recipe: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    dataset: Annotated[str, StringConstraints(pattern=r"^ds_[0-9a-z]{26}$")] | None = None
    name: Name | None = None
    metadata: Metadata = {}
    model: Architecture | ModelReference | None = None
    params: dict[str, Any] = {}
    training: Training = Training()
    data: Data = Data()
    resources: Resources = Resources()
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first.")
