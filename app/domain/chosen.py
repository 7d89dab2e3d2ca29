"""Which samples a job looks at, and which of its numbers that forbids. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from app.domain.errors import Detail
from app.domain.pointers import pointer


def chosen_samples(params: Mapping[str, Any], splits: Mapping[str, int]) -> int:
    """Count the samples that a job looks at: those of its parameter `splits` (null is all), else the training split."""
    names: Sequence[str] | None = params.get("splits", ("train",))
    return sum(splits.get(name, 0) for name in (splits if names is None else set(names)))


def too_many(requires: Mapping[str, Any], params: Mapping[str, Any], splits: Mapping[str, int]) -> list[Detail]:
    """Find the splits that have no sample, and the numbers that are not below the number of samples.

    `splits` is how many samples each split of the dataset has.
    """
    names: Sequence[str] = params.get("splits") or ()
    empty = [name for name in names if not splits.get(name)]
    there = ", ".join(name for name, size in splits.items() if size)
    found = [
        Detail(pointer="/params/splits", message=f"The dataset has no {name} split; it has {there}.") for name in empty
    ]
    samples = chosen_samples(params, splits)
    for name in requires.get("fewer_than_samples", ()):
        for at, value in _numbers(name, params.get(name)):
            if value >= samples:
                message = f"There are {samples} samples to look at; {value} must be less than that."
                found.append(Detail(pointer=pointer(("params", *at)), message=message))
    return found


def _numbers(name: str, value: Any) -> list[tuple[tuple[str | int, ...], int]]:
    if isinstance(value, list | tuple):
        return [((name, place), int(each)) for place, each in enumerate(cast(Sequence[Any], value))]
    return [] if value is None or isinstance(value, str | bool) else [((name,), int(value))]
