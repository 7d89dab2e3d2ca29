"""`make methods`: what every unsupervised method has learnt after the same seconds of training.

One row per recipe in `worker/pretrain`, beside the same backbone untrained and the bare pixels; on the built-in digits,
or with `--data` on a part of an image folder. Every number is of the test split: what k-NN and a linear layer read from
the exported backbone after they saw labels of the training split, all of them or, of the digits, ten per class. Methods
never see any. An untrained backbone is shown twice where it has batch norm: as it starts, and with the statistics of
the training images, which a trained one has too; methods are held against the better one.

The budget is the time inside the training loop, probes and checkpoints included, decoding and pictures not. Cells that
are done stay in the JSON file and are not run again; several processes may fill one file together. Images and the
models of cells under way lie beside it.
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from tests.benchmarks.methods import table
from tests.benchmarks.methods.budget import within_budget
from tests.benchmarks.methods.cells import PIXELS, REFERENCES, SETTLED, Cell, Results, Set, alone, network_of
from tests.benchmarks.methods.probes import read_off, settle_norms
from tests.benchmarks.ours import assembled, facts_of
from tests.benchmarks.pairs import Bench, Numbers, picture_folder
from tests.benchmarks.sides import MODEL, THREADS
from worker import catalogue
from worker.parts import machine

TRAIN, TEST = 10_000, 5_000  # pictures of a folder that take part, the same number of every class
LABELS_OF_DIGITS = 10  # of each class
Measure = Callable[[Cell, Set, Path, Results], Numbers]


def measure(cell: Cell, images: Set, work: Path, results: Results) -> Numbers:
    """Train, where there is something to train, and look at what came out."""
    kept = work / f"{cell.data}-{cell.method}-{cell.seed}" if cell.method not in REFERENCES else None
    trained = within_budget(cell, images, work, kept, results) if kept else {}
    network = network_of(cell.method, images)
    spec = {
        "recipe": "image_classification", "model": MODEL if kept else network, "training": {"seed": cell.seed},
        "data": {"validation_fraction": 0.0},
    }  # fmt: skip
    made = assembled({**images.asked(work), "spec": spec, "out": str(work), "model": str(kept) if kept else None})
    backbone: nn.Module = nn.Flatten() if cell.method == PIXELS else made.objective.backbone  # type: ignore[assignment]
    if cell.method.endswith(SETTLED):
        settle_norms(backbone, made.data, made.device)
    found = read_off(backbone, made, labels_per_class=images.labels_per_class, seed=cell.seed)
    if kept is not None:
        shutil.rmtree(kept)
    architecture = None if cell.method == PIXELS else network["architecture"]
    return {**vars(cell), "architecture": architecture, **found, **trained, "commit": _commit()}


def _commit() -> str | None:
    try:
        asked = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def chosen(only: str | None) -> list[str]:
    """Give the references and the recipes of these names, comma separated; by default every pretraining recipe.

    Raises:
        SystemExit: a name is not known; the message lists those that are.
    """
    known = sorted(name for name, recipe in catalogue.recipes().items() if recipe.kind == "pretrain")
    wanted = only.split(",") if only else known
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"There is no method {', '.join(unknown)}; there are: {', '.join(known)}.")
    return [*REFERENCES, *wanted]


def fill(
    cells: Sequence[Cell], images: Set, work: Path, results: Results, measure: Measure = measure
) -> list[tuple[str, str]]:
    """Run every cell that is neither done nor another process's; give what failed, with its reason."""
    failed: list[tuple[str, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(images.name, total=len(cells))
        for cell in cells:
            label, began = f"{cell.method}, seed {cell.seed}", time.monotonic()
            progress.update(task, description=f"{images.name}: {label}")
            with results.claimed(cell, work) as mine:
                if mine and not results.has(cell):
                    try:
                        row = measure(cell, images, work, results)
                    except Exception as error:
                        failed.append((label, f"{type(error).__name__}: {error}"))
                        progress.console.print(f"{label} failed: {error}", markup=False)
                    else:
                        with results.changed() as content:
                            content["machine"] = {**machine.fingerprint("cpu"), "threads": THREADS}
                            content["cells"].append(row)
                        said = f"{label}: k-NN {row['knn']:.3f}, linear {row['linear']:.3f}"
                        progress.console.print(f"{said} ({time.monotonic() - began:.0f} s)", markup=False)
            progress.advance(task)
    return failed


def images_of(data: Path | None, work: Path) -> Set:
    """Give the digits, or a part of a folder, ingested."""
    if data is None:
        images = Set("digits", "builtin:digits", patch=2, labels_per_class=LABELS_OF_DIGITS)
    else:
        folder = data.resolve()
        bench = Bench(folder, work / folder.name)
        part = bench.part(min(TRAIN, bench.samples()), min(TEST, bench.samples("test")))
        images = Set(folder.name, str(part), patch=4, labels_per_class=None)
    facts_of(images.folder, work / "ingested", THREADS)
    return images


def main() -> int:
    """Fill what is missing and print the table; 1 when something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.methods", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/methods.json"))
    parser.add_argument(
        "--data", type=picture_folder, help="an image folder with train/ and test/; without it the digits"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of training, for each method and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="names of recipes, comma separated")
    given = parser.parse_args()
    results, work, wanted = Results(given.out), given.out.with_suffix(""), chosen(given.only)
    work.mkdir(parents=True, exist_ok=True)
    with alone(work / "images.lock"):
        images = images_of(given.data, work)
    cells = [
        Cell(images.name, method, seed, given.seconds) for seed in range(given.seeds) for method in wanted
        if seed == 0 or method != PIXELS or images.labels_per_class  # no seed changes pixels with all their labels
    ]  # fmt: skip
    failed = fill(cells, images, work, results)
    rows = [row for row in results.read()["cells"] if any(cell.is_of(row) for cell in cells)]
    table.show(rows, REFERENCES, failed, given.out.with_name(f"{given.out.stem}-{images.name}.md"))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
