"""What a line of the table is: a function that runs pairs, both sides in turn, and what their ratio means."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Numbers = dict[str, Any]
Compare = Literal["rate", "time", "cost", "share", "quality"]
Quality = Literal["accuracy", "loss"]
BUDGET = 1850.0  # ten times what our side took on two cores, and a little more


@dataclass(frozen=True)
class Bench:
    """Where the pictures are, where this run keeps what it makes, and how much it shall do."""

    folder: Path  # train/ and test/, with a folder per class
    work: Path  # of this run; parts of the pictures and our decoded images lie below
    pairs: int = 3
    seed: int = 0
    budget: float = BUDGET  # seconds that `cifar_85` gives the other side

    @property
    def cache(self) -> Path:
        """Where our side keeps decoded images between runs."""
        return self.work / "cache"

    def part(self, train: int, test: int = 0, *, evaluated_as: str = "test") -> Path:
        """Give a folder with the first so many pictures of each split, the same from every class.

        The test pictures lie under `evaluated_as`; `validation` has our side look at them after every epoch.

        Raises:
            ValueError: a class has too few; the message names its folder.
        """
        folder = self.work / f"part-{train}-{test}-{evaluated_as}"
        if not folder.exists():
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            for split, name, count in (("train", "train", train), ("test", evaluated_as, test)):
                classes = sorted(one for one in (self.folder / split).iterdir() if one.is_dir())
                wanted = count // max(len(classes), 1)
                for each in classes if count else []:
                    files = sorted(each.iterdir())[:wanted]
                    if len(files) < wanted:
                        raise ValueError(
                            f"{each} has {len(files)} pictures, and this line needs {wanted} of each class"
                        )
                    (half / name / each.name).mkdir(parents=True)
                    for file in files:
                        shutil.copyfile(file, half / name / each.name / file.name)
            half.rename(folder)
        return folder

    def samples(self, split: str = "train") -> int:
        """Count the pictures of a split."""
        return sum(len(os.listdir(each)) for each in (self.folder / split).iterdir())


def picture_folder(given: str) -> Path:
    """Read an argument: an image folder whose `train/` and `test/` hold the same folders, one for each class.

    Raises:
        argparse.ArgumentTypeError: it is none; the message says what is missing.
    """
    folder = Path(given)
    found = []
    for split in ("train", "test"):
        place = folder / split
        found.append({each.name for each in place.iterdir() if each.is_dir()} if place.is_dir() else set[str]())
        if not found[-1]:
            raise argparse.ArgumentTypeError(f"{place} is no folder with a folder of pictures for each class.")
    if found[0] != found[1]:
        raise argparse.ArgumentTypeError(
            f"train/ and test/ of {folder} differ in their classes: {', '.join(sorted(found[0] ^ found[1]))}."
        )
    return folder


@dataclass(frozen=True)
class Pair:
    """One measured pair, each side in the unit of its workload."""

    ours: float
    other: float
    quality: tuple[float, float] | None = None  # None where only speed is compared
    bound: bool = False  # the other side was ended before it was done: the ratio is at least this
    more: dict[str, float] = field(default_factory=dict)  # what else was seen; the JSON has the medians
    summary: dict[str, float] = field(default_factory=dict)  # over all pairs so far; the last one counts


@dataclass(frozen=True)
class Workload:
    """One line of the table.

    compare
        rate: ours / other, at least `goal`; time: other / ours, at least `goal`; cost and share: ours / other, at most
        `goal`; quality: ours / other, and ours at most `goal` points (hundredths) below, spread over seeds aside.
    quality
        What the pairs' `quality` is: an accuracy, of which ours may be half a point below, or a loss, of which it may
        be a hundredth above; spread over seeds aside. Speed alone meets no goal.
    real_pictures
        It says nothing at all of pictures drawn at random.
    as_good_as
        The workload that compares the quality of what is only timed here. Where it is in the same run, both have to
        meet their goals; where it is not, no goal is met, and the line says that it is fast enough.
    """

    name: str
    unit: str
    goal: float
    compare: Compare
    run: Callable[[Bench], Iterator[Pair]]
    only_if_asked: bool = False
    limits: tuple[tuple[str, float], ...] = ()  # further goals: names in `more` and what their medians may be at most
    quality: Quality = "accuracy"
    help: str = ""
    as_good_as: str | None = None
    real_pictures: bool = False

    def ratio(self, pair: Pair) -> float:
        """Give the ratio in the direction of the goal."""
        return pair.other / pair.ours if self.compare == "time" else pair.ours / pair.other

    @property
    def smaller_is_better(self) -> bool:
        """Say whether the goal is an upper limit."""
        return self.compare in ("cost", "share")


WORKLOADS: list[Workload] = []


def workload(
    name: str,
    unit: str,
    goal: float,
    compare: Compare = "rate",
    *,
    only_if_asked: bool = False,
    quality: Quality = "accuracy",
    as_good_as: str | None = None,
    real_pictures: bool = False,
    **limits: float,
) -> Callable[[Callable[[Bench], Pair | Iterator[Pair]]], Callable[[Bench], Any]]:
    """Enter a function into the table: one that runs one pair for a seed, or one that yields all its pairs."""

    def enter(run: Callable[[Bench], Pair | Iterator[Pair]]) -> Callable[[Bench], Any]:
        def pairs(bench: Bench) -> Iterator[Pair]:
            for seed in range(bench.pairs):
                found = run(Bench(bench.folder, bench.work, bench.pairs, seed, bench.budget))
                if not isinstance(found, Pair):
                    yield from found
                    return
                yield found

        said = (run.__doc__ or "").strip().split("\n")[0]
        real = real_pictures or compare == "quality"
        WORKLOADS.append(
            Workload(
                name, unit, goal, compare, pairs, only_if_asked, tuple(limits.items()), quality, said, as_good_as, real
            )
        )
        return run

    return enter
