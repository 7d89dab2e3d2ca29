"""The recipe contract: what a file in `pretrain/`, `finetune/` or `apply/` declares, and what it is told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts, Split
from app.domain.models import ModelConfig
from app.domain.spec import Spec

# What `inputs` is given: "image" [batch, channels, height, width], uint8, or float in [0, 1] for a dataset of 16 bits;
# "label" int64 [batch] (-1 = no label); "index" int64 [batch] (the sample's number); "epoch" int64 [batch], from 0. It
# may add, replace or drop keys. Every tensor whose key starts with "image" is, when `inputs` is done with it, of one of
# these two kinds as well; the loop then normalises it per channel.
Batch = dict[str, Tensor]
Kind = Literal["pretrain", "finetune", "apply"]
Width = Annotated[int, Field(ge=1, le=16384)]
# What a recipe that uses a model looks at; None is every split.
Splits = Annotated[tuple[Split, ...], Field(min_length=1)] | None


class Params(BaseModel):
    """The base of every recipe's parameters: an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PretrainParams(Params):
    """What every pretraining recipe lets its user say about the network that it starts from.

    Both are for unsupervised fine-tuning: going on, on new images, from a model that already knows something.
    """

    backbone_learning_rate_scale: float = Field(
        default=1.0, gt=0, le=10, description="The backbone's learning rate as a part of everything else's."
    )
    freeze_stages: int = Field(
        default=0, ge=0, le=64, description="This many of the backbone's first stages stay as they are."
    )


class Head(Params):
    """The layers after the backbone: a fine-tuning recipe's parameter `head`, which is exported with the model."""

    hidden: Width | Annotated[tuple[Width, ...], Field(max_length=8)] = Field(
        default=(), description="Width of one hidden layer, or of each of several; empty is a linear head."
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(default="relu", description="After a hidden layer.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Before the last layer and between hidden ones.")

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden layers as a tuple."""
        return (self.hidden,) if isinstance(self.hidden, int) else self.hidden


@dataclass(frozen=True)
class Requires:
    """What a recipe needs of the data and of the network; published, so that a job is refused before it is queued."""

    labels: bool = False
    unlabelled: bool = False  # rows without a label, beside labelled ones
    test_labels: bool = False  # a test split with labels, because that is what the result is about
    min_samples: int = 1
    min_batch: int = 1
    min_classes: int = 0
    architectures: tuple[str, ...] | None = None  # families: "convolutional", "mlp", "vit"; None is any
    reason: str | None = None  # said when the architecture is refused
    alone: str | None = None  # why the loss cannot take turns with another one over one backbone
    trained: bool = False  # a model, or an architecture with published weights; a random start is refused
    # Parameters, each a number or several, that must be below the number of samples in the splits that the job looks at
    # (its parameter `splits`; `train` for a recipe without one).
    fewer_than_samples: tuple[str, ...] = ()
    up_to_unlabelled: tuple[str, ...] = ()  # parameters that are at most the unlabelled samples of these splits
    sample_numbers: tuple[str, ...] = ()  # parameters that hold numbers of samples, counted over all splits
    # What a value of a parameter needs beyond the rest: {"method": {"tsne": {"min_samples": 8}}}; `labels`, too.
    where: Mapping[str, Mapping[str, Mapping[str, int | bool]]] = field(default_factory=dict)
    # Fields of the body that stay at their defaults, and why: {"training.early_stopping": "all train equally long"}.
    without: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()  # fields that change nothing, which a job is warned of


@dataclass(frozen=True)
class Progress:
    """Where a run is. Frozen: a recipe reads it and never keeps time by itself."""

    step: int
    steps: int
    epoch: int
    epochs: int

    @property
    def fraction(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self.step / max(self.steps, 1)


@dataclass(frozen=True)
class Info:
    """What a recipe may know of its data and network before it builds anything."""

    task: str
    classes: tuple[str, ...]
    samples: int  # training samples of this run
    channels: int
    image_size: int
    feature_dimension: int  # of the backbone's output, [batch, feature_dimension]
    architecture: Mapping[str, Any]  # its published facts
    pretrained: bool = False  # the network starts from weights worth keeping: a model's, or published ones
    class_counts: tuple[int, ...] = ()  # kept training labels by class
    labelled: int = 0  # training samples with a label, which pretraining reports by and never trains on
    mean: tuple[float, ...] = (0.0,)  # what the loop normalises with, per channel, of pixels in [0, 1]
    std: tuple[float, ...] = (1.0,)
    seed: int = 0  # of what is drawn once for the whole run
    recipe: Callable[[str], "Recipe"] = field(default=lambda name: _no_catalogue(name))


def _no_catalogue(name: str) -> "Recipe":
    raise LookupError(f"no catalogue was given to look up the recipe {name!r}")


class FeaturesOf(Protocol):
    """What `before_epoch` is given: features of all training rows, in order."""

    @property
    def labels(self) -> Tensor:
        """int64 [rows], -1 where there is none: for reports, never for training."""
        ...

    @property
    def tick(self) -> Callable[[int, int], None]:
        """What long work with the features calls between its pieces, with how many of how many are done."""
        ...

    def __call__(self, module: nn.Module | None = None) -> Tensor:
        """Run the backbone, or this module, over the rows, in eval mode and without augmentation: float32 [rows, d]."""
        ...


class Objective(Protocol):
    """What `build` returns: an `nn.Module` whose forward gives a loss. Only the first three are required.

    Where several processes train, each sees its share of a batch in `forward`, and the loss of the run is the mean of
    theirs: what looks at a whole batch, or writes it into a buffer, passes through `parts.distributed.all_gather`. What
    `forward` draws by itself (dropout, noise, masks) each draws for its own samples; the other hooks draw alike.

    backbone
        the part that is exported.
    forward(batch, progress)
        `{"loss": scalar tensor, …scalars to log}`.
    couples_batch
        whether the loss ties the samples of a batch together (contrastive, batch statistics), so that a batch is never
        split behind the user's back.

    Optional, looked up by name:

    head                             exported with the backbone, as one network (fine-tuning)
    parameter_groups(training)       -> [{"names" or "params", "lr_scale", "weight_decay_scale"}]
    backbone_learning_rate_scale     float: multiplies the rates of all that `parameter_groups` says of the backbone
    at_step(progress)                -> {"learning_rate": scale, "weight_decay": scale}
    before_epoch(features_of, progress)   at an epoch's first step only; may return parameters whose optimiser state is
                                     reset; `features_of` is a FeaturesOf, whose row n is the sample with "index" n
    after_backward(progress)
    after_step(progress)
    evaluate(batch)                  -> per-sample tensors: {"logits": [batch, classes]} and/or {"loss": [batch]}
    ema_decay                        float or None: the loop keeps an average of all weights and buffers (which are
                                     changed in place, never replaced), and that is what is validated and exported
    frozen_prefix                    nn.Module or None: what comes first and never trains. The loop calls it once per
                                     sample (and view), in eval mode, keeps the output in bf16, and hands over batches
                                     with "prefix" [batch, …] in place of "image". None where `inputs` mixes samples
    no_prefix                        str or None: why frozen layers are no `frozen_prefix`, for the plan's reasons
    sample_weights(labels)           [samples] -> [samples] or None: how often each row is drawn, asked for at every
                                     epoch's start; None is each row once per epoch
    labelled_part(step) -> 0 to 1    the part of that step's batch that is drawn from rows with a label; the others come
                                     from those without. At 0 all rows are drawn alike, and the batch has no "label";
                                     else "labelled", float32 [batch], says in each row what part of the whole batch has
                                     a label, of which a micro-batch may hold more or less
    compiled_parts                   modules to compile where the plan says so; without it the backbone alone
    step_passes                      float: what a step costs, in forward passes of the backbone over its samples; 3
                                     without it. Probes come as seldom as keeps them under 3 % of that
    idle_parameters                  whether some trainable parameters get no gradient in some steps, which several
                                     processes have to know
    pictures(batch)                  -> {"name": [n, channels, height, width], normalised}: saved as name.png at the end
                                     in rows of eight; of the first eight training rows, or of those that
                                     `picture_rows() -> int64 [n]` names
    probed(features)                 -> {"name": number}, told beside every probe's own; in eval mode, from the
                                     backbone's features of the probed rows, [rows, d]
    least_spread                     float: an epoch that ends with a smaller `spread`, which forward gives of the
                                     embeddings that the loss compares (1 where it should be), has collapsed
    teacher                          nn.Sequential that begins with a copy of the backbone: stages frozen in the
                                     backbone are frozen in it too
    fixed_numbers                    names of scalars from forward that training does not change, so that no run is
                                     stopped early by them
    opponents                        {"name of its loss": its submodules}: the loss is a sum of opposed ones and need
                                     not fall; each of these does while the submodules of the others stand still
    """

    backbone: nn.Module
    couples_batch: bool

    def __call__(self, batch: Batch, progress: Progress) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Samples:
    """Some rows of a dataset, split after split, each split in its own order."""

    numbers: Tensor  # int64 [n], counted over all splits, as in /v1/datasets/{id}/samples
    labels: Tensor  # int64 [n], -1 where there is none or where the job's label budget hides it
    split: Tensor  # int64 [n], into `app.domain.datasets.SPLITS`

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Context:
    """What `apply` is given: a trained model, a dataset, and ways to look at one through the other.

    Long work calls `tick` between its pieces: it is the sign of life, and it ends the job where something else than
    going on is wanted. An apply job keeps no checkpoint: paused or drained it begins again, and finds the features that
    were complete in the cache of the host.

    samples(splits)      the rows of these splits; None is every split of the dataset
    features(samples)    float32 [n, d], computed once per split in batches under the plan's autocast, and cached
    images(numbers)      uint8 [n, channels, size, size] of samples by number
    tick(phase, done, total)
    event(code, message, level=…, **data)   one line for the job's log
    """

    params: Any
    info: Info
    backbone: nn.Module  # on the device, in eval mode
    head: nn.Module | None
    device: torch.device
    seed: int
    scratch: Path  # where the files of the result are written
    samples: Callable[[Sequence[str] | None], Samples]
    features: Callable[[Samples], Tensor]
    images: Callable[[Tensor], Tensor]
    tick: Callable[[str, int, int], None]
    event: Callable[..., None]


@dataclass(frozen=True)
class Result:
    """What an `apply` recipe made: a JSON result, files below scratch by name, and metrics."""

    result: dict[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)  # name -> media type
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What an orchestrating recipe may know: nothing of pixels or weights, so `plan` and `gather` are pure."""

    spec: Spec  # of the job itself
    dataset: DatasetFacts | None
    model: str | None  # the id of the model in the job's body, once it is there
    config: ModelConfig | None  # of that model
    family: str | None  # of the network to start from, as in `Requires.architectures`
    recipes: "Mapping[str, Recipe]"
    stopping: bool = False  # `gather` makes the best of children that are not all there


@dataclass(frozen=True)
class Child:
    """A job that an orchestrating job made, and what became of it."""

    key: str
    job: str
    status: str
    spec: Mapping[str, Any]
    result: Mapping[str, Any] | None
    metrics: Mapping[str, float | None]
    best: Mapping[str, Any] | None
    model: str | None
    error: Mapping[str, Any] | None

    @property
    def ended_well(self) -> bool:
        """Whether it has a result; one that was stopped early has, too."""
        return self.status in ("succeeded", "stopped")

    @property
    def why(self) -> str:
        """What went wrong, in words; for a child that did not end well."""
        return str((self.error or {}).get("message") or f"It was {self.status}.")


@dataclass(frozen=True)
class Gathered:
    """What a round of children came to: a JSON result, metrics, and files as `name -> (media type, content)`."""

    result: dict[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    model: str | None = None  # of a child: the model that this job gives, too


Build = Callable[[Any, nn.Module, Info], nn.Module]
# Names every child that is wanted, given those that ended: the bodies of jobs, each with a `child_key` beside it. Those
# whose key is there already are not made again; when no new one is named, `gather` makes the result. A body that leaves
# out `dataset` or `resources` gets the job's own. A child that failed is no error by
# itself: the recipe goes on with the rest as long as that answers its question, and names what is missing.
PlanChildren = Callable[[Any, Facts, Sequence[Child]], list[dict[str, Any]]]
Gather = Callable[[Any, Facts, Sequence[Child]], Gathered]
# None: nothing to do to a batch, which lets a frozen prefix be computed once per sample.
Inputs = Callable[[Any, Info], Callable[[Batch, torch.Generator], Batch] | None]


@dataclass(frozen=True)
class Recipe:
    """One way to train or to use a model. `defaults` is laid over the defaults of the job body, before the user's."""

    name: str
    kind: Kind
    version: str
    summary: str
    tasks: Sequence[str]
    Params: type[Params]
    requires: Requires = Requires()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    build: Build | None = None
    inputs: Inputs | None = None
    apply: Callable[[Context], Result] | None = None
    plan: PlanChildren | None = None
    gather: Gather | None = None
    gives_model: bool = False  # `gather` names a model, so another job may start from this one
