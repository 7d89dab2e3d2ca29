"""Whether a recipe, a network and a dataset can work together, and what will hardly work as meant. Pure."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from app.domain.chosen import too_many, unmet, unread
from app.domain.errors import Detail
from app.domain.metrics import falls
from app.domain.pointers import pointer
from app.domain.recipes import TRAINS, Published
from app.domain.spec import Spec

_PRESET_LOOKS = 40_000  # samples seen, each time anew, below which a preset's few epochs hardly teach


@dataclass(frozen=True)
class Network:
    """The network a job starts from: the options that build it, and its architecture's published facts.

    `pointer` is where the request names it: below `/model` for an architecture, `/model` itself for a reference.
    """

    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    by_reference: bool = False

    def pointer(self, option: str) -> str:
        """Give the place in the request that chose `option`."""
        return "/model" if self.by_reference else pointer(("model", option))


def check(spec: Spec, recipe: Published, network: Network | None, dataset: Mapping[str, Any] | None) -> list[Detail]:
    """Find what cannot work in the combination of recipe, network and data.

    `dataset` is the stored `DatasetFacts`; null, like a null network, leaves its checks out.
    """
    details: list[Detail] = []
    if dataset is not None:
        details += _check_data(spec, recipe, dataset)
    if network is not None:
        details += _check_network(recipe, network)
        details += _check_trainable(spec, network)
    return details


def _check_data(spec: Spec, recipe: Published, dataset: Mapping[str, Any]) -> Iterable[Detail]:
    requires = recipe.requires
    samples = int(dataset["splits"].get("train", 0))
    labelled = int(dataset["labelled"].get("train", 0))
    classes = len(dataset["classes"])
    if requires.get("labels") and labelled == 0:
        yield Detail(
            pointer="/dataset",
            message=f"{recipe.name} needs labels, and no training sample of this dataset has one: use a dataset with "
            "class folders, or a pretrain recipe.",
        )
        return
    if recipe.tasks and dataset["task"] not in recipe.tasks:
        tasks = ", ".join(recipe.tasks)
        yield Detail(
            pointer="/dataset",
            message=f"{recipe.name} works on {tasks}; the task of this dataset is {dataset['task']}.",
        )
    if requires.get("labels") and classes < int(requires.get("min_classes", 0)):
        yield Detail(
            pointer="/dataset",
            message=f"{recipe.name} needs at least {requires['min_classes']} classes; this dataset has {classes}: "
            f"{', '.join(map(str, dataset['classes'])) or 'none'}.",
        )
    if requires.get("test_labels") and not dataset["labelled"].get("test"):
        yield Detail(
            pointer="/dataset",
            message=f"{recipe.name} measures on the test split, and no test sample of this dataset has a label: use a "
            "dataset with a labelled `test` folder.",
        )
    keeps_all_labels = spec.data.label_fraction == 1 and spec.data.labels_per_class is None
    if requires.get("unlabelled") and labelled == samples and keeps_all_labels:
        yield Detail(
            pointer="/dataset",
            message=f"{recipe.name} needs unlabelled training samples, and every one here has a label: add some, or"
            " keep only part of the labels with data.label_fraction.",
        )
    least = int(requires.get("min_samples", 1))
    if samples < least:
        yield Detail(
            pointer="/dataset", message=f"{recipe.name} needs at least {least} training samples; there are {samples}."
        )
        return
    budget = not keeps_all_labels  # then the run knows which labels are hidden
    yield from too_many(requires, spec.params, dataset["splits"], {} if budget else dataset["labelled"])
    yield from unmet(requires, spec.params, dataset["splits"], dataset["labelled"])
    if recipe.kind in TRAINS:
        yield from _check_batch(spec, recipe, samples)
        yield from _check_stopping(spec, recipe, dataset)


def _check_batch(spec: Spec, recipe: Published, samples: int) -> Iterable[Detail]:
    least, batch = int(recipe.requires.get("min_batch", 1)), spec.training.batch_size
    if isinstance(batch, int) and batch < least:
        yield Detail(
            pointer="/training/batch_size",
            message=f"{recipe.name} needs at least {least} samples per batch, not {batch}.",
        )
    elif samples < least:
        yield Detail(
            pointer="/dataset", message=f"{recipe.name} needs batches of at least {least}; there are {samples} samples."
        )
    accumulate = spec.training.accumulate
    if isinstance(batch, int) and isinstance(accumulate, int) and batch % accumulate:
        yield Detail(
            pointer="/training/accumulate",
            message=f"{batch} samples do not divide into {accumulate} micro-batches of one size.",
        )
    elif isinstance(batch, int) and isinstance(accumulate, int) and least <= batch < least * accumulate:
        yield Detail(
            pointer="/training/accumulate",
            message=f"{recipe.name} needs at least {least} samples per micro-batch; {accumulate} of a batch of {batch} "
            f"have {batch // accumulate}.",
        )


def _check_stopping(spec: Spec, recipe: Published, dataset: Mapping[str, Any]) -> Iterable[Detail]:
    stopping = spec.training.early_stopping
    if stopping is None or "training.early_stopping" in unread(recipe.requires, spec):
        return
    name, where = stopping.metric, "/training/early_stopping/metric"
    if not name.startswith(("train/", "validation/", "probe/")):
        yield Detail(pointer=where, message=f"{name} is no metric of a run: train/, validation/ or probe/ comes first.")
        return
    try:
        falls(name)
    except ValueError as error:
        yield Detail(pointer=where, message=str(error))
    if name.startswith("probe/") and recipe.kind != "pretrain":
        yield Detail(pointer=where, message=f"{recipe.name} does not probe its features: use a metric of validation/.")
    if name.startswith("validation/") and not dataset["splits"].get("validation"):
        sets_apart = bool(recipe.requires.get("labels"))
        if sets_apart and spec.data.validation_fraction == 0:
            message = "the dataset has no validation split, and data.validation_fraction is 0."
        elif not sets_apart:
            message = (
                f"the dataset has no validation split, and {recipe.name} sets no samples apart: use a metric of train/ "
                "or probe/."
            )
        else:
            return
        yield Detail(pointer=where, message=f"There is nothing to measure {name} on: {message}")


def _check_network(recipe: Published, network: Network) -> Iterable[Detail]:
    options, facts = network.options, network.facts
    name, families = options["architecture"], recipe.requires.get("architectures")
    if families is not None and facts.get("family") not in families:
        reason = recipe.requires.get("reason") or f"{recipe.name} works with {' and '.join(families)} networks only"
        yield Detail(
            pointer=network.pointer("architecture"), message=f"{name} is a {facts.get('family')} network: {reason}."
        )
    size, smallest = options.get("image_size"), facts.get("min_image_size")
    patch = options.get("patch") or facts.get("patch")
    # The smallest size is that of the standard stem; what a small one takes is in the architecture's own schema.
    if size is not None and smallest is not None and size < smallest and options.get("stem") != "small":
        yield Detail(
            pointer=network.pointer("image_size"),
            message=f"{name} needs images of at least {smallest} pixels, not {size}.",
        )
    if size is not None and patch and size % patch:
        low, high = size - size % patch, size - size % patch + patch
        fits = " or ".join(str(fit) for fit in (low, high) if fit)
        yield Detail(
            pointer=network.pointer("image_size"),
            message=f"{name} cuts images into patches of {patch} pixels, which do not divide {size}: use {fits}.",
        )
    keep, stages = options.get("keep_stages"), _stages(network)
    if keep is not None and stages is not None and keep > stages:
        yield Detail(
            pointer=network.pointer("keep_stages"), message=f"{name} has {stages} stages; keep_stages cannot be {keep}."
        )


def _stages(network: Network) -> int | None:
    """Give the number of stages, whether it was published as a number or as their names, or follows from an option."""
    option = network.facts.get("stages_from")
    given: Any = network.options.get(option) if option else None
    if given is not None:
        # The embedding of a transformer is a stage of its own.
        return len(cast(Sequence[Any], given)) if isinstance(given, list | tuple) else int(given) + 1
    stages: Any = network.facts.get("stages")
    return len(cast(Sequence[Any], stages)) if isinstance(stages, list) else stages


def _check_trainable(spec: Spec, network: Network) -> Iterable[Detail]:
    found = re.fullmatch(r"last:(\d+)", str(spec.params.get("trainable", "")))
    stages = _stages(network)
    if found is None or stages is None:
        return
    stages = min(stages, network.options.get("keep_stages") or stages)
    if not 1 <= int(found[1]) <= stages:
        yield Detail(
            pointer="/params/trainable",
            message=f"{network.options['architecture']} has {stages} stages here: use last:1 to last:{stages}, or all.",
        )


def warnings(spec: Spec, recipe: Published, dataset: Mapping[str, Any] | None) -> list[str]:
    """Name what will work, but hardly as meant."""
    found = [f"{field} changes nothing: {recipe.name} does not read it." for field in unread(recipe.requires, spec)]
    samples = int(dataset["splits"].get("train", 0)) if dataset else None
    batch = spec.training.batch_size
    if spec.resources.device == "cpu" and spec.resources.gpus > 1:
        found.append(f"resources.gpus is {spec.resources.gpus}, but resources.device is cpu: no GPU is used.")
    if samples is not None and isinstance(batch, int) and batch > samples:
        found.append(f"training.batch_size is {batch}, but there are only {samples} training samples.")
    if spec.training.preset is not None and samples and spec.training.steps is None:
        epochs = math.ceil(_PRESET_LOOKS / samples)
        if spec.training.epochs < epochs:
            found.append(
                f"training.preset {spec.training.preset} was made for tens of thousands of samples; with {samples}, "
                f"{spec.training.epochs} epochs are few: try training.epochs {epochs}."
            )
    if dataset and spec.data.labels_per_class is not None and dataset["classes"]:
        asked = spec.data.labels_per_class * len(dataset["classes"])
        if asked > int(dataset["labelled"].get("train", 0)):
            found.append(f"data.labels_per_class asks for {asked} labels, more than the training split has.")
    return found
