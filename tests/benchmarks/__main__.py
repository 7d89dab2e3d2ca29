"""`make bench`: run pairs in turn, ours and the other way, and print the ratios.

`--data FOLDER` is an image folder with `train/` and `test/`; without it, pictures are drawn at random, which is enough
for rates and senseless for accuracies, so those are left out. A workload that fails is named under the table, and the
others still run.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.benchmarks import table
from tests.benchmarks.pairs import BUDGET, Bench, Numbers, Workload, picture_folder
from tests.benchmarks.workloads import WORKLOADS


def random_pictures(folder: Path, *, per_class: int = 1000, classes: int = 10, size: int = 32) -> None:
    """Write JPEGs of coloured noise over a colour of their class."""
    draws = torch.Generator().manual_seed(0)
    for split, count in (("train", per_class), ("test", per_class // 5)):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            colour = torch.randint(64, 192, (3, 1, 1), generator=draws)
            for number in range(count):
                noise = torch.randint(-64, 64, (3, size, size), generator=draws)
                pixels = (colour + noise).to(torch.uint8).permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(place / f"{number:05}.jpg", quality=90)


def chosen(only: str | None, *, pictures: bool = True) -> list[Workload]:
    """Give the workloads of these names, comma separated; by default all but those that must be asked for.

    `outside_steps` stands for every workload whose name begins so. Without real pictures accuracies say nothing.

    Raises:
        SystemExit: a name is not known; the message lists those that are. Or one needs pictures.
    """
    if not only:
        return [each for each in WORKLOADS if not each.only_if_asked and (pictures or not each.real_pictures)]
    names, known = only.split(","), {each.name: each for each in WORKLOADS}
    meant = {name: [known[name]] if name in known else _beginning(name) for name in names}
    if unknown := [name for name, found in meant.items() if not found]:
        raise SystemExit(f"There is no workload {', '.join(unknown)}; there are: {', '.join(known)}.")
    wanted = list({each.name: each for found in meant.values() for each in found}.values())
    if senseless := [each.name for each in wanted if each.real_pictures and not pictures]:
        raise SystemExit(f"{', '.join(senseless)}: accuracies need real pictures; give a folder with --data (DATA=…).")
    return wanted


def _beginning(name: str) -> list[Workload]:
    return [each for each in WORKLOADS if each.name.startswith(f"{name}_")]


def measure(
    wanted: Sequence[Workload], bench: Bench, out: Path, *, options: str = "", pictures: bool = True
) -> tuple[list[Numbers], list[tuple[str, str]]]:
    """Run them, writing the JSON after each; give the lines, and what failed with its reason.

    Of random `pictures` no accuracy is kept.
    """
    rows: list[Numbers] = []
    failed: list[tuple[str, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        everything = progress.add_task("all workloads", total=len(wanted))
        for each in wanted:
            task, began = progress.add_task(each.name, total=None), time.monotonic()
            found = []
            try:
                for pair in each.run(bench):
                    found.append(pair)
                    progress.advance(task)
            except Exception as error:
                failed.append((each.name, f"{type(error).__name__}: {error}"))
                progress.console.print(f"{each.name} failed: {error}", markup=False)
            if found:
                row = table.line(each, found, time.monotonic() - began, options=options, pictures=pictures)
                rows = table.compared([*rows, row])
                table.write(rows, out)
            progress.update(task, total=len(found), completed=len(found))
            progress.advance(everything)
    return rows, failed


def main() -> int:
    """Run what was asked for; 1 when something failed."""
    names = "\n".join(
        f"  {each.name:<36}{each.help}{' (only if asked for)' if each.only_if_asked else ''}" for each in WORKLOADS
    )
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, epilog=f"workloads:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--only", help="names of workloads, or how several begin, comma separated")
    parser.add_argument("--data", type=picture_folder, help="an image folder with train/ and test/")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for the other side of cifar_85")
    given = parser.parse_args()
    wanted = chosen(given.only, pictures=given.data is not None)
    options = f"PAIRS={given.pairs} BUDGET={given.budget:g}" + (f" DATA={given.data}" if given.data else "")
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        folder = given.data or Path(work) / "pictures"
        if given.data is None:
            random_pictures(folder)
        bench = Bench(folder.resolve(), Path(work), given.pairs, budget=given.budget)
        rows, failed = measure(
            wanted, bench, given.out, options=options, pictures=given.data is not None
        )  # fmt: skip
    left_out = [each.name for each in WORKLOADS if each.only_if_asked and each not in wanted]
    table.show(rows, failed, left_out if not given.only else [])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
