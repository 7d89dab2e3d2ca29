"""`make bench`: run pairs in turn, ours and the naive way, and print the ratios.

`--data FOLDER` is an image folder with `train/` and `test/`; without it, pictures are drawn at random, which is enough
for rates and senseless for accuracies.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import write_jpeg

from tests.benchmarks.workloads import WORKLOADS, Bench, Pair, Workload


def random_pictures(folder: Path, *, per_class: int = 300, classes: int = 10, size: int = 32) -> None:
    """Write JPEGs of coloured noise over a colour of their class."""
    draws = torch.Generator().manual_seed(0)
    for split, count in (("train", per_class), ("test", per_class // 5)):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            colour = torch.randint(64, 192, (3, 1, 1), generator=draws)
            for number in range(count):
                noise = torch.randint(-64, 64, (3, size, size), generator=draws)
                write_jpeg((colour + noise).to(torch.uint8), str(place / f"{number:05}.jpg"))


def measured(workload: Workload, bench: Bench, pairs: int) -> dict[str, Any]:
    """Run a workload's pairs and sum them up."""
    found: list[Pair] = [
        workload.run(Bench(bench.folder, bench.cache, seed=seed))
        for seed in track(range(pairs), description=workload.name, console=Console(stderr=True))
    ]
    rate = workload.unit.endswith("/s")
    ratios = [pair.ours / pair.other if rate else pair.other / pair.ours for pair in found]
    qualities = [pair.quality for pair in found if pair.quality is not None]
    quality = None
    if qualities:
        quality = {
            "ours": statistics.mean(mine for mine, _ in qualities),
            "other": statistics.mean(theirs for _, theirs in qualities),
        }
    return {
        "name": workload.name,
        "ours": statistics.median(pair.ours for pair in found),
        "other": statistics.median(pair.other for pair in found),
        "unit": workload.unit,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "goal": workload.goal,
        "quality": quality,
        "pairs": pairs,
        "command": f"make bench ONLY={workload.name}",
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="Ours against the naive way, both in this run")
    for heading in ("workload", "ours", "other", "unit", "ratio", "min to max", "goal", "quality: ours / other"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for row in rows:
        ratio, quality = row["ratio"], row["quality"]
        said = f"{quality['ours']:.3f} / {quality['other']:.3f}" if quality else ""
        table.add_row(row["name"], f"{row['ours']:.1f}", f"{row['other']:.1f}", row["unit"], f"{ratio['median']:.2f}",
                      f"{ratio['min']:.2f} to {ratio['max']:.2f}", f"{row['goal']:g}", said)  # fmt: skip
    Console().print(table)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--only", choices=[each.name for each in WORKLOADS])
    parser.add_argument("--data", type=Path, help="an image folder with train/ and test/")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = given.data or Path(work) / "pictures"
        if given.data is None:
            random_pictures(folder)
        bench = Bench(folder, Path(work) / "cache")
        chosen = [each for each in WORKLOADS if given.only in (None, each.name)]
        rows = []
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for each in chosen:
            rows.append(measured(each, bench, given.pairs))
            given.out.write_text(json.dumps(rows, indent=2))
    show(rows)


if __name__ == "__main__":
    main()
