"""Training for a number of seconds: as many steps as fit, because the learning rate has to end with the budget."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.methods.cells import Cell, Results, Set, network_of
from tests.benchmarks.pairs import Numbers
from tests.benchmarks.sides import run

NEARLY = 0.1  # how far a run may be from its budget
TRIES = 3
ENDLESS = 1_000_000  # steps
Train = Callable[[Cell, Set, Path, Path, Numbers], Numbers]


def train(cell: Cell, images: Set, work: Path, kept: Path, training: Numbers) -> Numbers:
    """Run a pretraining job in a process of its own, as `tuneyard run` does; the model goes to `kept`."""
    shutil.rmtree(kept, ignore_errors=True)
    out = kept.with_suffix(".out")
    spec = {
        "recipe": cell.method, "model": network_of(cell.method, images), "training": {"seed": cell.seed, **training},
    }  # fmt: skip
    try:
        lines = run("ours", {**images.asked(work), "spec": spec, "out": str(out), "model": None})
        (out / "model").rename(kept)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    by_type = {line["type"]: line for line in lines}
    last = by_type["finished"]
    return {
        **{name: last["result"][name] for name in ("steps", "seconds", "samples_per_second")},
        "batch_size": by_type["planned"]["plan"]["batch_size"],
        "probes": {name: value for name, value in last["metrics"].items() if name.startswith("probe/")},
    }


def within_budget(cell: Cell, images: Set, work: Path, kept: Path, results: Results, train: Train = train) -> Numbers:
    """Train for the seconds of the cell. A run that took a tenth more or less is repeated at the speed that it had."""
    key = f"{cell.data}/{cell.method}"
    rate = results.read()["rates"].get(key)
    if rate is None:
        short = train(cell, images, work, kept, {"steps": ENDLESS, "max_seconds": max(2.0, cell.budget / 5)})
        rate = short["steps"] / short["seconds"]
    tries = 0
    while True:
        done = train(cell, images, work, kept, {"steps": max(1, round(rate * cell.budget))})
        rate, tries = done["steps"] / done["seconds"], tries + 1
        with results.changed() as content:
            content["rates"][key] = rate
        if abs(done["seconds"] / cell.budget - 1) <= NEARLY or tries == TRIES:
            return done
