"""Supervised image classification: a new head on a backbone, and as much of the backbone as should follow."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from app.domain.errors import UserFault
from worker.data.mirror import alternating
from worker.data.policy import Augment, Level, View, mix, policy
from worker.data.rand_augment import BINS, RandAugment, beside
from worker.parts.backbones import Stage, stage_modules
from worker.parts.heads import build_head
from worker.recipe import Batch, Head, Info, Params, Progress, Recipe, Requires


class RandAugmentParams(Params):
    """RandAugment (arXiv 1909.13719)."""

    operations: int = Field(default=2, ge=1, le=8, description="How many of its 14 operations each sample gets.")
    magnitude: float = Field(default=9.0, ge=0, le=BINS, description="How strong they are.")
    spread: float = Field(
        default=0.0, ge=0, le=10, description="Standard deviation of each sample's own magnitude around it."
    )


class ClassificationParams(Params):
    """How to fine-tune."""

    trainable: Annotated[str, Field(pattern=r"^(head|all|gradual|last:[1-9][0-9]?)$")] = Field(
        default="all",
        description="`head`, `last:N` stages and the head, `all`, or `gradual`: all, one stage after another.",
    )
    backbone_learning_rate_scale: float = Field(
        default=1.0, gt=0, le=10, description="The backbone's learning rate as a part of the head's."
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="Multiplies the learning rate once per stage away from the head."
    )
    head: Head = Field(default=Head(), description="What stands between the features and the classes.")
    augmentation: Level | None = Field(
        default=None,
        description="null: `none` with `head` and `last:N`, whose frozen part is computed once; else light.",
    )
    mirror: Literal["random", "alternating"] = Field(
        default="random",
        description="Where `augmentation` mirrors: by a coin each time, or each sample in every other epoch.",
    )
    vertical_flip: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Probability of turning upside down, for images without an up (aerial, cells).",
    )
    rand_augment: RandAugmentParams | None = Field(
        default=None,
        description="RandAugment after the crops and mirrors of `augmentation`, in place of its turns and colours. "
        "It works on bytes: images of 16 bits are cut to 8 in training.",
    )
    mixup: float = Field(default=0.0, ge=0, le=10, description="Beta parameter of MixUp; 0 is off.")
    cutmix: float = Field(default=0.0, ge=0, le=10, description="Beta parameter of CutMix; 0 is off.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Part of the target spread over all classes.")
    class_balance: Literal["none", "weighted", "resample"] = Field(
        default="none", description="Rare classes: `weighted` in the loss, or drawn more often by `resample`."
    )
    ema: float | None = Field(
        default=None, ge=0.5, lt=1, description="Decay per step of an average of the weights, which is then the model."
    )

    @property
    def level(self) -> Level:
        """The augmentation in force."""
        if self.augmentation is not None:
            return self.augmentation
        return "light" if self.trainable in ("all", "gradual") else "none"


class Classifier(nn.Module):
    """Backbone and head under a cross entropy. Frozen stages stay in eval mode: their batch norm stands still."""

    couples_batch = False

    def __init__(self, params: ClassificationParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.params, self.backbone = params, backbone
        self.head = build_head(
            info.feature_dimension,
            len(info.classes),
            hidden=params.head.widths,
            activation=params.head.activation,
            dropout=params.head.dropout,
            bias=bool(backbone.head_bias),
        )
        self.ema_decay = params.ema
        # A list keeps the stages out of the state dict: their layers are already there, under the backbone.
        self._stages: list[Stage] = stage_modules(backbone)
        self.frozen_stages = _frozen_stages(params.trainable, len(self._stages))
        self._still = self.frozen_stages  # stages that do not train right now; `gradual` lowers it
        for stage in self._stages[: self.frozen_stages]:
            stage.requires_grad_(False)
        weights = _class_weights(info.class_counts) if params.class_balance == "weighted" else None
        self.register_buffer("class_weights", weights, persistent=False)
        if params.trainable == "gradual":
            self._still = len(self._stages)

    @property
    def frozen_prefix(self) -> nn.Module | None:
        """The leading stages that never train; None where there are none, or where inputs are mixed."""
        if self.frozen_stages == 0 or self.params.mixup or self.params.cutmix:
            return None
        return nn.Sequential(*self._stages[: self.frozen_stages])

    @property
    def no_prefix(self) -> str | None:
        """Why stages that stand still are no such prefix; None where there are none, or one."""
        if self.params.trainable == "gradual":
            return "which layers stand still changes during the run (docs/decisions/0017)"
        mixes = self.frozen_stages and self.frozen_prefix is None
        return "mixup and cutmix make new inputs in every step" if mixes else None

    @property
    def idle_parameters(self) -> bool:
        """Stages that wait to be thawed get no gradient."""
        return self.params.trainable == "gradual"

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The backbone, and its stages, which are called one by one where some of them stand still."""
        return [self.backbone, *self._stages]  # what is never called is never compiled

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for stage in self._stages[: self._still]:
            stage.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        if self.params.trainable == "gradual":
            self._thaw(progress)
        logits = self._logits(batch)
        labels = batch["label"]
        known = labels >= 0
        target = batch.get("target", labels.clamp(min=0))
        losses = F.cross_entropy(
            logits.float(), target, reduction="none", label_smoothing=self.params.label_smoothing
        )  # [batch]
        if self.class_weights is not None:
            weights = cast(Tensor, self.class_weights)
            losses = losses * (target @ weights if target.dim() == 2 else weights[target])
        logged = {"loss": (losses * known).sum() / known.sum().clamp(min=1)}
        if "target" not in batch:
            hits = (logits.argmax(1) == labels) & known
            logged["accuracy"] = hits.sum() / known.sum().clamp(min=1)
        return logged

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give the logits `[batch, classes]`."""
        return {"logits": self._logits(batch)}

    def parameter_groups(self, training: Any) -> list[dict[str, Any]]:  # noqa: ARG002 (the contract's argument)
        """One group per stage: the learning rate falls with the distance from the head (layer decay)."""
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr_scale": 1.0}]
        for distance, stage in enumerate(reversed(self._stages), start=1):
            scale = self.params.backbone_learning_rate_scale * self.params.layer_decay**distance
            groups.append({"params": list(stage.parameters()), "lr_scale": scale})
        return groups

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        """With `resample`, draw every class equally often: weights `[samples]` for labels `[samples]`."""
        if self.params.class_balance != "resample":
            return None
        counts = torch.bincount(labels.clamp(min=0), weights=(labels >= 0).double())
        return (1 / counts.clamp(min=1))[labels.clamp(min=0)] * (labels >= 0)

    def _logits(self, batch: Batch) -> Tensor:
        if "prefix" in batch:
            x = batch["prefix"]
            x = x if torch.is_autocast_enabled(x.device.type) else x.to(next(self.head.parameters()).dtype)
            return self.head(self._run(x, self.frozen_stages))
        if self._still == 0:
            return self.head(self.backbone(batch["image"]))  # as a whole, because it may be compiled as a whole
        return self.head(self._run(batch["image"], 0))

    def _run(self, x: Tensor, start: int) -> Tensor:
        with torch.no_grad():
            for stage in self._stages[start : self._still]:
                x = stage(x)
        for stage in self._stages[max(start, self._still) :]:
            x = stage(x)
        return x

    def _thaw(self, progress: Progress) -> None:
        # The head alone first, then one stage after another from the back, all of them from half of the run on.
        count = len(self._stages)
        still = max(0, count - int(2 * progress.fraction * (count + 1)))
        if still != self._still:
            self._still = still
            self.train(self.training)


def _frozen_stages(trainable: str, count: int) -> int:
    if trainable == "head":
        return count
    if not trainable.startswith("last:"):
        return 0
    last = int(trainable.removeprefix("last:"))
    if last > count:
        raise UserFault(
            f"trainable is {trainable!r}, but this network has {count} stages: use last:1 to last:{count}, or all.",
            code="trainable",
        )
    return count - last


def _class_weights(counts: Sequence[int]) -> Tensor:
    """Weigh classes by the inverse of their frequency, so that the mean weight of a sample is 1; unseen ones get 0."""
    numbers = torch.tensor(counts, dtype=torch.float32)
    seen = numbers > 0
    return torch.where(seen, numbers.sum() / (numbers.clamp(min=1) * seen.sum()), 0.0)


def inputs(params: ClassificationParams, info: Info) -> Any:
    """Augment, then mix; None when there is nothing to do, so that a frozen prefix needs one pass only."""
    view = policy(params.level, image_size=info.image_size, channels=info.channels)
    alternates = params.mirror == "alternating" and view is not None and view.flip > 0
    if alternates and view is not None:
        view = replace(view, flip=0.0)
    if params.vertical_flip:
        view = replace(view or View(info.image_size), vertical_flip=params.vertical_flip)
    augment: Augment | None = view
    if params.rand_augment is not None:
        drawn = params.rand_augment
        augment = beside(view, RandAugment(drawn.operations, drawn.magnitude, drawn.spread))
    if augment is None and not params.mixup and not params.cutmix:
        return None

    def prepare(batch: Batch, generator: Generator) -> Batch:
        if alternates:
            batch = alternating(batch, info.seed)
        if augment is not None:
            batch = {**batch, "image": augment(batch["image"], generator)}
        return mix(batch, generator, mixup=params.mixup, cutmix=params.cutmix, classes=len(info.classes))

    return prepare


RECIPE = Recipe(
    name="image_classification",
    kind="finetune",
    version="1",
    summary="Teach a network to tell classes of images apart: the head alone, its last stages, or all of it.",
    tasks=("image_classification",),
    Params=ClassificationParams,
    requires=Requires(labels=True, min_samples=2, min_classes=2),
    build=Classifier,
    inputs=inputs,
)
