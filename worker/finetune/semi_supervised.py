"""Learn from labelled and unlabelled images together: supervised and unsupervised steps over one backbone.

With the name of a pretraining recipe as `objective`, whole steps alternate between the cross entropy of a head and that
recipe's loss. `fixmatch` is a consistency objective of its own (parts/fixmatch.py), where every batch holds both kinds
of samples and the loss is the sum of both terms (arXiv 2001.07685, section 2.2).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Generator, Tensor, nn

from app.domain.errors import UserFault
from app.domain.inner_jobs import Part
from app.domain.spec import Training
from worker.data.policy import Augment, Level, View, policy
from worker.data.rand_augment import BINS, RandAugment, beside
from worker.parts import distributed
from worker.parts.backbones import stage_modules
from worker.parts.fixmatch import consistency, follow, mean_over
from worker.parts.heads import build_head
from worker.recipe import Batch, Head, Info, Params, PretrainParams, Progress, Recipe, Requires

FIXMATCH = "fixmatch"
# Said where another one is refused; any other pretraining recipe without the hooks below works as well.
OBJECTIVES = ("simclr", "byol", "vicreg", "barlow_twins", "dino", "autoencoder", "vae", "mae")
WORKING = f"{FIXMATCH}, {', '.join(OBJECTIVES)} (with vision transformers only)"


class FixMatchParams(Params):
    """`objective_params` of fixmatch."""

    threshold: float | None = Field(
        default=None, ge=0, le=1,
        description="The paper's tau: least confidence of a pseudo-label that counts; null is the mean confidence so "
        "far, up to the paper's 0.95: a short run ends before most samples reach that.",
    )  # fmt: skip
    operations: int = Field(
        default=2, ge=1, le=8,
        description="Of RandAugment, in the strong view; it works on bytes, and cuts images of 16 bits to 8 there.",
    )  # fmt: skip
    magnitude: float = Field(default=10.0, ge=0, le=BINS, description="Of these operations, in the mean.")
    spread: float = Field(default=5.0, ge=0, le=10, description="Standard deviation of each sample's own magnitude.")
    cutout: float = Field(default=1.0, ge=0, le=1, description="Probability that the strong view loses a box.")


class SemiSupervisedParams(Params):
    """Both kinds of steps."""

    objective: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)] = Field(
        default=FIXMATCH, description="`fixmatch`, or the pretraining recipe whose loss the unlabelled images get."
    )
    objective_params: dict[str, Any] = Field(
        default={}, description="Parameters of that objective.",
        json_schema_extra=Part(
            named_by="objective", kinds=("pretrain",), in_turns=True,
            own={FIXMATCH: FixMatchParams.model_json_schema()},
            without=dict.fromkeys(
                PretrainParams.model_fields,
                "the backbone is that of both kinds of steps; use params.backbone_learning_rate_scale or "
                "params.layer_decay",
            ),
        ).keyword(),
    )  # fmt: skip
    ratio: float | None = Field(
        default=None, ge=0.01, le=1000,
        description="Unsupervised steps for each supervised one; with fixmatch unlabelled images for each labelled one "
        "in every batch, the paper's mu. null is 1, and 7 with fixmatch.",
    )  # fmt: skip
    weight: float = Field(default=1.0, ge=0, le=1000, description="Of the unsupervised loss; the paper's lambda_u.")
    head: Head = Field(default=Head(), description="What stands between the features and the classes.")
    augmentation: Level = Field(default="light", description="Of labelled images; with fixmatch that is the weak view.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Part of the target spread over all classes.")
    backbone_learning_rate_scale: float = Field(
        default=1.0, gt=0, le=10, description="The backbone's learning rate as a part of the head's."
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="Multiplies the learning rate once per stage away from the head."
    )
    ema: float | None = Field(
        default=0.999, ge=0.5, lt=1,
        description="Decay per step of an average of the weights, which is then the model; null is off.",
    )  # fmt: skip


@dataclass(frozen=True)
class Turns:
    """Which steps are supervised: evenly `1 / (1 + ratio)` of them, the first one among them."""

    ratio: Fraction

    def supervised_before(self, step: int) -> int:
        """Count the supervised ones of the first `step` steps."""
        return -(-step * self.ratio.denominator // (self.ratio.numerator + self.ratio.denominator))

    def is_supervised(self, step: int) -> bool:
        """Say whether this step is one."""
        return self.supervised_before(step + 1) > self.supervised_before(step)

    def unsupervised(self, progress: Progress) -> Progress:
        """Give the run as the other steps see it: they count themselves alone."""
        done, of = (at - self.supervised_before(at) for at in (progress.step, progress.steps))
        return Progress(done, of, progress.epoch, progress.epochs)


class SemiSupervised(nn.Module):
    """Backbone and head; beside them another recipe's objective over the same backbone, unless that is FixMatch's."""

    def __init__(self, params: SemiSupervisedParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        self.params, self.backbone, self.ema_decay = params, backbone, params.ema
        recipe, inner = chosen(params, info)
        self.head = build_head(
            info.feature_dimension, len(info.classes), hidden=params.head.widths, activation=params.head.activation,
            dropout=params.head.dropout, bias=bool(backbone.head_bias),
        )  # fmt: skip
        self.unsupervised: Any = None
        if recipe is not None and recipe.build is not None:
            self.unsupervised = borrowed(recipe.build(inner, backbone, info))
        self._fixed = inner.threshold if isinstance(inner, FixMatchParams) else 1.0
        if self._fixed is None:
            self.register_buffer("threshold", torch.tensor(1 / len(info.classes)))  # nobody is less confident
        self._confidence: list[Tensor] = []  # in the micro-batches of this step
        self._ratio = params.ratio or (7.0 if recipe is None else 1.0)
        self._turns = Turns(Fraction(self._ratio).limit_denominator(1000))
        self.couples_batch = recipe is not None and bool(self.unsupervised.couples_batch)

    @property
    def idle_parameters(self) -> bool:
        """The head waits in unsupervised steps, and what belongs to the other objective in supervised ones."""
        return self.unsupervised is not None

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """Name what is called with images."""
        return getattr(self.unsupervised, "compiled_parts", [self.backbone])

    def labelled_part(self, step: int) -> float:
        """Draw labelled rows for supervised steps and all for the others; with FixMatch some of each for every step."""
        if self.unsupervised is None:
            return 1 / (1 + self._ratio)
        return 1.0 if self._turns.is_supervised(step) else 0.0

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        if "label" not in batch:
            found: dict[str, Tensor] = self.unsupervised(batch, self._turns.unsupervised(progress))
            return {**found, "loss": self.params.weight * found["loss"], "unsupervised": found["loss"]}
        labels = batch["label"]
        known = labels >= 0
        part = batch.get("labelled", known.float()).mean()
        if self.unsupervised is not None:
            logits = self._logits(batch["image"])
            return self._supervised(logits, labels, known, part)
        # Both views in one forward, so that batch norm sees all of them together.
        logits, strong = self._logits(torch.cat([batch["image"], batch["image_strong"]])).chunk(2)
        told = self._supervised(logits, labels, known, part)
        threshold = self.get_buffer("threshold").clone() if self._fixed is None else self._fixed
        terms, confident, confidence = consistency(logits, strong, threshold=threshold)
        unsupervised = mean_over(terms, ~known, 1 - part)
        if self.training and self._fixed is None:
            self._confidence.append(mean_over(confidence, ~known, 1 - part))
        return {
            **told, "loss": told["loss"] + self.params.weight * unsupervised, "unsupervised": unsupervised,
            "confident": mean_over(confident.float(), ~known, 1 - part),
        }  # fmt: skip

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give the logits `[batch, classes]`."""
        return {"logits": self._logits(batch["image"])}

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        """Let the learning rate fall with the distance from the head, and keep the other objective's own groups."""
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr_scale": 1.0}]
        for distance, stage in enumerate(reversed(stage_modules(self.backbone)), start=1):
            scale = self.params.backbone_learning_rate_scale * self.params.layer_decay**distance
            groups.append({"params": list(stage.parameters()), "lr_scale": scale})
        if hasattr(self.unsupervised, "parameter_groups"):
            for group in self.unsupervised.parameter_groups(training):
                named = {"names": [f"unsupervised.{name}" for name in group["names"]]} if "names" in group else {}
                groups.append({**group, **named})
        return groups

    def at_step(self, progress: Progress) -> dict[str, float]:
        """Give the other objective's scales at its own steps."""
        return self._passed_on("at_step", progress) or {}

    def after_backward(self, progress: Progress) -> None:
        """Tell the other objective of its own steps."""
        self._passed_on("after_backward", progress)

    def after_step(self, progress: Progress) -> None:
        """Let FixMatch's threshold follow, over all processes; tell the other objective of its own steps."""
        if self._confidence:
            mean = distributed.mean(torch.stack(self._confidence).mean())
            follow(self.get_buffer("threshold"), mean, steps=progress.steps)
            self._confidence.clear()
        self._passed_on("after_step", progress)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Show what the other objective shows."""
        return self.unsupervised.pictures(batch) if hasattr(self.unsupervised, "pictures") else {}

    def _passed_on(self, hook: str, progress: Progress) -> Any:
        if hasattr(self.unsupervised, hook) and not self._turns.is_supervised(progress.step):
            return getattr(self.unsupervised, hook)(self._turns.unsupervised(progress))
        return None

    def _logits(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def _supervised(self, logits: Tensor, labels: Tensor, known: Tensor, part: Tensor) -> dict[str, Tensor]:
        """Give equation 3, the mean cross entropy of the labelled samples, which are `part` of the whole batch."""
        losses = F.cross_entropy(
            logits.float(), labels.clamp(min=0), reduction="none", label_smoothing=self.params.label_smoothing
        )  # [batch]
        loss, hits = mean_over(losses, known, part), (logits.argmax(1) == labels).float()
        return {"loss": loss, "supervised": loss, "accuracy": mean_over(hits, known, part)}


def chosen(params: SemiSupervisedParams, info: Info) -> tuple[Recipe | None, Any]:
    """Give the recipe of the unsupervised objective, None for FixMatch, and its parameters.

    Raises:
        UserFault: it cannot be one here, or its parameters do not hold; the message names the field.
    """
    name, recipe = params.objective, None
    if name != FIXMATCH:
        try:
            recipe = info.recipe(name)
        except UserFault as error:
            raise UserFault(f"params.objective: there is no {name!r}; use {WORKING}.", code="objective") from error
        if recipe.kind != "pretrain":
            raise UserFault(f"params.objective: {name} is no pretraining recipe; use {WORKING}.", code="objective")
        if recipe.requires.alone is not None:
            raise UserFault(
                f"params.objective: {name} cannot take turns with supervised steps, because {recipe.requires.alone}; "
                f"use {WORKING}. Or pretrain with it first, and give its model to this job.", code="objective",
            )  # fmt: skip
        families, family = recipe.requires.architectures, info.architecture["family"]
        if families is not None and family not in families:
            why = recipe.requires.reason or f"{name} works with {' and '.join(families)} networks only"
            raise UserFault(f"params.objective: this is a {family} network: {why}.", code="architecture")
    if given := sorted(PretrainParams.model_fields.keys() & params.objective_params.keys()):
        raise UserFault(
            f"params.objective_params.{given[0]}: the backbone is that of both kinds of steps; use "
            "params.backbone_learning_rate_scale or params.layer_decay.", code="invalid_spec",
        )  # fmt: skip
    try:
        return recipe, (recipe.Params if recipe else FixMatchParams).model_validate(params.objective_params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in ("params.objective_params", *first["loc"]))
        raise UserFault(f"{where}: {first['msg']} (of {name}).", code="invalid_spec") from error


def borrowed(objective: nn.Module) -> nn.Module:
    """Let an objective keep its backbone without owning it, in place.

    Under two names every weight of the backbone would be twice in checkpoints and in the average of the weights, which
    swaps what it holds, name by name.
    """
    objective.__dict__["backbone"] = objective._modules.pop("backbone")
    return objective


def inputs(params: SemiSupervisedParams, info: Info) -> Callable[[Batch, Generator], Batch]:
    """Prepare batches with labels for the head; those without as the other recipe does.

    With FixMatch every batch gets a weak view, "image", and a strong one, "image_strong".
    """
    recipe, inner = chosen(params, info)
    view = policy(params.augmentation, image_size=info.image_size, channels=info.channels)
    weak: Augment = view if view is not None else lambda images, _: images
    if recipe is None:
        drawn = RandAugment(inner.operations, inner.magnitude, inner.spread)
        strong = beside(replace(view or View(info.image_size), erase=inner.cutout), drawn)
        return lambda batch, draws: {
            **batch, "image": weak(batch["image"], draws), "image_strong": strong(batch["image"], draws),
        }  # fmt: skip
    other = recipe.inputs(inner, info) if recipe.inputs is not None else None

    def prepare(batch: Batch, draws: Generator) -> Batch:
        if "label" in batch:
            return {**batch, "image": weak(batch["image"], draws)}
        return other(batch, draws) if other is not None else batch

    return prepare


RECIPE = Recipe(
    name="semi_supervised",
    kind="finetune",
    version="1",
    summary="Learn classes from few labels and many unlabelled images at once: FixMatch, or a pretraining loss.",
    tasks=("image_classification",),
    Params=SemiSupervisedParams,
    requires=Requires(labels=True, unlabelled=True, min_samples=4, min_batch=4, min_classes=2),
    defaults={"training": {"epochs": 50}},
    build=SemiSupervised,
    inputs=inputs,
)
