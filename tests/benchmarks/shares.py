"""The part of a training run that is neither forward pass nor backward pass nor optimiser, method by method.

`make bench ONLY=outside_steps` measures them all, `ONLY=outside_steps_simclr` one. 10,000 images, `small_cnn` at its
default width (a small vision transformer where a method takes nothing else), 32 pixels, everything else as `auto` has
it. A run goes through the real loop with real checkpoints. What counts begins after the first few steps and goes on
from one probe to the next, which is also from one clustering to the next, so whatever comes once in some epochs is in
it as often as in a long run; decoding before and the pictures, test and export after are not. Outside is everything but
those three: reading, augmentation (also the one that a GAN applies within its forward pass) and normalisation, teachers
and other hooks, clipping, pseudo-labels, probes, validation, logging, checkpoints, the loop itself. `health` is probes
alone.
`python -m tests.benchmarks.shares '{…}'` measures in a process of its own.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks.pairs import Bench, Numbers, Pair, workload
from tests.benchmarks.sides import THREADS, run
from worker import catalogue

NAME, GOAL, HEALTH = "outside_steps", 0.15, 0.03
IMAGES = 10_000
EPOCHS = 3  # where nothing is probed; else from one probe to the next, which is as many for so many images
WARM = 3  # steps that do not count
BESIDE = ("step_ms", "epochs", "busy_threads")  # in `more`, and no share
LABELS = 25  # of each class, where labelled and unlabelled images train together


def spec_of(recipe: str, seed: int) -> Numbers:
    """Give the spec of a run with nothing said that has a default."""
    requires = catalogue.recipe(recipe).requires
    takes = requires.architectures
    network = "small_cnn" if takes is None or "convolutional" in takes else "small_vit"
    data = {"data": {"labels_per_class": LABELS}} if requires.unlabelled else {}
    model = {"architecture": network, "image_size": 32}
    return {"recipe": recipe, "model": model, "training": {"seed": seed}, **data}


def _of(recipe: str) -> None:
    def share(bench: Bench) -> Pair:
        found = run(
            "shares",
            {
                "spec": spec_of(recipe, bench.seed), "folder": str(bench.part(IMAGES)), "cache": str(bench.cache),
                "ingested": str(bench.work / "ingested"), "threads": THREADS,
            }, timeout=1800.0,
        )[-1]  # fmt: skip
        return Pair(found["outside"], found["seconds"], more=found["shares"])

    share.__doc__ = f"Seconds of a run of {recipe} outside of forward, backward and optimiser, over all of them."
    workload(f"{NAME}_{recipe}", "s", GOAL, "share", only_if_asked=True, health=HEALTH)(share)


for _each in catalogue.recipes().values():
    if _each.kind == "pretrain" or _each.requires.unlabelled:
        _of(_each.name)


def breakdown(rows: Sequence[Numbers]) -> Table | None:
    """Give where the time of each method goes, in hundredths of it; None where none was measured."""
    found = [row for row in rows if row["name"].startswith(NAME)]
    if not found:
        return None
    sections = [name for name in found[0]["more"] if name not in BESIDE]
    made = Table(title="Where the time of a run goes, %")
    for heading in ("method", *sections, "all outside", "ms a step"):
        made.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    for row in found:
        shares = [f"{100 * row['more'][name]:.1f}" for name in sections]
        colour = "green" if row["met"] else "red"
        made.add_row(
            row["name"].removeprefix(f"{NAME}_"), *shares, f"[{colour}]{100 * row['ratio']['median']:.1f}[/]",
            f"{row['more']['step_ms']:.0f}",
        )  # fmt: skip
    return made


def measure(asked: Numbers) -> Numbers:
    """Train for some epochs with a stopwatch beside the loop.

    Returns:
        seconds, of which `outside`, and `shares`: every section over all of them, `step_ms`, how many `epochs`, and
        how many `busy_threads` there were on average (below 1 the machine did something else).
    """
    from tests.benchmarks.ours import order_of
    from tests.benchmarks.stopwatch import INSIDE, Stopwatch, clock_of, watching
    from worker import loop
    from worker.checkpoint import Checkpoints
    from worker.recipe import Progress
    from worker.report import Message, Reporter
    from worker.trainer.assembly import assemble, start

    def listen(message: Message) -> None:
        message.model_dump_json()  # what it takes to send it

    reporter, order = Reporter(listener=listen), order_of(asked)
    made = start(assemble(order, reporter), order, reporter)
    objective: Any = made.objective
    epochs = asked.get("epochs") or made.plan.probe_every or EPOCHS
    watch = Stopwatch(clock_of(made.device))
    readings: list[dict[str, float]] = []
    first, last = WARM, WARM + epochs * made.plan.steps_per_epoch
    hook = getattr(objective, "after_step", None)

    def after_step(progress: Progress) -> None:
        if hook is not None:
            hook(progress)
        if progress.step + 1 in (first, last):
            readings.append({**watch.read(), "processor": time.process_time()})
        if progress.step + 1 == last:
            reporter.want("pause")

    objective.after_step = after_step
    with watching(made, watch):
        loop.train(
            objective, made.data, made.spec.training, made.plan, made.device, reporter,
            Checkpoints(Path(order.scratch), reporter), kind=made.recipe.kind,
        )  # fmt: skip
    before, after = readings
    seconds = {name: value - before[name] for name, value in after.items()}
    processor = seconds.pop("processor")
    total = sum(seconds.values())
    inside = sum(seconds[name] for name in INSIDE)
    shares = {name: value / total for name, value in seconds.items()}
    return {
        "seconds": total, "outside": total - inside,
        "shares": {
            **shares, "step_ms": 1000 * inside / (last - first), "epochs": epochs, "busy_threads": processor / total,
        },
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure({**json.loads(sys.argv[1]), "out": scratch})))
