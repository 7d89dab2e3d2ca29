"""Which samples a job looks at, and which of its values that or the recipe forbids. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from app.domain.errors import Detail
from app.domain.pointers import pointer
from app.domain.spec import Spec

Json = dict[str, Any]
Counts = Mapping[str, int]  # by split


def chosen_samples(params: Mapping[str, Any], counts: Counts) -> int:
    """Count the samples that a job looks at: those of its parameter `splits` (null is all), else the training split."""
    names: Sequence[str] | None = params.get("splits", ("train",))
    return sum(counts.get(name, 0) for name in (counts if names is None else set(names)))


def too_many(
    requires: Mapping[str, Any], params: Mapping[str, Any], splits: Counts, labelled: Counts
) -> Iterable[Detail]:
    """Find the splits that have no sample, and the numbers that are too large for the samples there are.

    `splits` and `labelled` are how many samples, and how many with a label, each split of the dataset has; an empty
    `labelled` is unknown.
    """
    names: Sequence[str] = params.get("splits") or ()
    there = ", ".join(name for name, size in splits.items() if size)
    for name in names:
        if not splits.get(name):
            yield Detail(pointer="/params/splits", message=f"The dataset has no {name} split; it has {there}.")
    samples = chosen_samples(params, splits)
    for at, value in _numbers(requires.get("fewer_than_samples", ()), params):
        if value >= samples:
            yield Detail(pointer=at, message=f"There are {samples} samples to look at; {value} must be less than that.")
            return
    free = samples - chosen_samples(params, labelled)
    for at, value in _numbers(requires.get("up_to_unlabelled", ()), params):
        if labelled and value > free:
            hint = "use a smaller number, or hide labels with data.labels_per_class to try this out"
            yield Detail(pointer=at, message=f"{free} of the samples have no label, not {value}: {hint}.")
    everything = sum(splits.values())
    for at, value in _numbers(requires.get("sample_numbers", ()), params):
        if value >= everything:
            yield Detail(
                pointer=at, message=f"There is no sample {value}; the dataset numbers them 0 to {everything - 1}."
            )


def unmet(requires: Mapping[str, Any], params: Mapping[str, Any], splits: Counts, labelled: Counts) -> Iterable[Detail]:
    """Find the values that need more samples, or labels, than the dataset has."""
    samples = chosen_samples(params, splits)
    for name, values in cast(Mapping[str, Json], requires.get("where", {})).items():
        value = params.get(name)
        needs: Mapping[str, Any] = values.get(str(value), {})
        if samples < needs.get("min_samples", 0):
            yield Detail(
                pointer=pointer(("params", name)),
                message=f"{value} needs at least {needs['min_samples']} samples; there are {samples} to look at: "
                f"choose another {name}.",
            )
        if needs.get("labels") and not labelled.get("train"):
            yield Detail(
                pointer=pointer(("params", name)),
                message=f"{value} needs labels, and no training sample of this dataset has one: choose another {name}.",
            )


def not_given(requires: Mapping[str, Any], spec: Spec, recipe: str) -> Iterable[Detail]:
    """Find the fields that a recipe wants left at their defaults."""
    without = cast(Mapping[str, str], requires.get("without", {}))
    for field in _changed(without, spec):
        yield Detail(pointer=pointer(field.split(".")), message=f"Leave this out for {recipe}: {without[field]}.")


def unread(requires: Mapping[str, Any], spec: Spec) -> list[str]:
    """Give the fields that were set though the recipe does not read them."""
    return list(_changed(requires.get("unread", ()), spec))


def _changed(fields: Iterable[str], spec: Spec) -> Iterable[str]:
    given = spec.model_dump()
    for field in fields:
        section, name = field.split(".")
        if given[section][name] != Spec.model_fields[section].default.model_dump()[name]:
            yield field


def _numbers(names: Iterable[str], params: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    for name in names:
        value = params.get(name)
        if isinstance(value, list | tuple):
            for place, each in enumerate(cast(Sequence[Any], value)):
                yield pointer(("params", name, place)), int(each)
        elif value is not None and not isinstance(value, str | bool):
            yield pointer(("params", name)), int(value)
