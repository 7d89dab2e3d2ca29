"""What a table is made of: sets of images, cells, and the JSON file that keeps what is done."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.pairs import Numbers
from tests.benchmarks.sides import THREADS
from worker import catalogue

NETWORKS: dict[str, Numbers] = {
    "convolutional": {"architecture": "small_cnn", "width": 0.5},
    "vit": {"architecture": "small_vit", "width": 96, "depth": 4, "heads": 3},
}
SETTLED = ", norms settled"
PIXELS = "pixels"
REFERENCES = (PIXELS, "untrained small_cnn", f"untrained small_cnn{SETTLED}", "untrained small_vit")


@dataclass(frozen=True)
class Set:
    """The images of a table."""

    name: str
    folder: str  # or builtin:NAME
    patch: int  # of small_vit
    labels_per_class: int | None  # that k-NN and the linear layer may learn from; None is all

    def asked(self, work: Path) -> Numbers:
        """Say to ours.py where the images are, and where it may keep what it makes of them."""
        return {
            "folder": self.folder, "cache": str(work / "cache"), "ingested": str(work / "ingested"), "threads": THREADS,
        }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A method, or a reference, under one seed."""

    data: str
    method: str
    seed: int
    budget: float  # seconds of training

    def is_of(self, row: Numbers) -> bool:
        """Say whether a line of the JSON file is this cell's."""
        return all(row[name] == value for name, value in vars(self).items())


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Results:
    """The JSON file: {"machine", "rates": steps per second, "cells"}. Several processes may fill it together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> Numbers:
        """Give what is there."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"rates": {}, "cells": []}

    def has(self, cell: Cell) -> bool:
        """Say whether a cell is done."""
        return any(cell.is_of(row) for row in self.read()["cells"])

    @contextmanager
    def changed(self) -> Iterator[Numbers]:
        """Hand out the newest content to change, and write it back at once."""
        with alone(self.path.with_suffix(".lock")):
            content = self.read()
            yield content
            half = self.path.with_suffix(".half")
            half.write_text(json.dumps(content, indent=1) + "\n")
            half.replace(self.path)

    @contextmanager
    def claimed(self, cell: Cell, work: Path) -> Iterator[bool]:
        """Take a cell for as long as this process lives; False where another one has it."""
        with (work / f"{cell.data}-{cell.method}-{cell.seed}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def network_of(method: str, images: Set) -> Numbers:
    """Give the backbone that a method, or an untrained reference, starts from."""
    families = ("vit",) if "small_vit" in method else ("convolutional",)
    if method in catalogue.recipes():
        families = catalogue.recipe(method).requires.architectures or families
    return NETWORKS["convolutional"] if "convolutional" in families else {**NETWORKS["vit"], "patch": images.patch}
