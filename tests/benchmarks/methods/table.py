"""From cells to a table of methods: mean and spread over seeds, and how far each is above the untrained backbone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.pairs import Numbers

HEADINGS = (
    "method", "k-NN, %", "linear, %", "k-NN over untrained, sd", "linear over untrained, sd", "effective rank",
    "samples/s", "steps", "seconds",
)  # fmt: skip
CLEAR = 2.0  # standard deviations that a method has to be above


@dataclass(frozen=True)
class Values:
    """An accuracy over seeds."""

    mean: float
    deviation: float | None  # None with one seed

    @staticmethod
    def of(rows: Sequence[Numbers], name: str) -> "Values":
        """Collect them."""
        found = [row[name] for row in rows]
        return Values(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)

    def over(self, other: "Values") -> float | None:
        """Give the difference in standard deviations of the difference between one run of each; None with one seed."""
        if self.deviation is None or other.deviation is None:
            return None
        both = math.hypot(self.deviation, other.deviation)
        difference = self.mean - other.mean
        return difference / both if both else math.copysign(math.inf, difference) if difference else 0.0

    def __str__(self) -> str:
        said = f"{100 * self.mean:.1f}"
        return said if self.deviation is None else f"{said} ± {100 * self.deviation:.1f}"


def lines(cells: Sequence[Numbers], references: Sequence[str]) -> list[Numbers]:
    """Give a line per method: its values, what it is compared with, and the medians of what a run took.

    A method is compared with the untrained backbone of its own architecture, with the better one where there are two.
    """
    by_method: dict[str, list[Numbers]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    made: list[Numbers] = []
    for method in [*references, *sorted(set(by_method) - set(references))]:
        rows = by_method.get(method)
        if not rows:
            continue
        line: Numbers = {"method": method, "seeds": len(rows)}
        untrained = [
            found for each in references if method not in references and (found := by_method.get(each))
            and found[0]["architecture"] == rows[0]["architecture"]
        ]  # fmt: skip
        for name in ("knn", "linear"):
            line[name] = Values.of(rows, name)
            best = max((Values.of(each, name) for each in untrained), key=lambda values: values.mean, default=None)
            line[f"{name}_over"] = line[name].over(best) if best else None
        for name in ("effective_rank", "samples_per_second", "steps", "seconds"):
            found = [row[name] for row in rows if name in row]
            line[name] = statistics.median(found) if found else None
        made.append(line)
    return made


def not_clear(made: Sequence[Numbers]) -> list[str]:
    """Name the methods that are above untrained by less than two standard deviations, by k-NN and by a linear layer."""
    overs = {line["method"]: (line["knn_over"], line["linear_over"]) for line in made}
    return [name for name, over in overs.items() if None not in over and max(over) <= CLEAR]


def texts(line: Numbers) -> tuple[str, ...]:
    """Give the cells of a line."""

    def over(value: float | None) -> str:
        return "" if value is None else f"{value:+.1f}"

    def number(value: float | None, form: str = ",.0f") -> str:
        return "" if value is None else format(value, form)

    return (
        line["method"], str(line["knn"]), str(line["linear"]), over(line["knn_over"]), over(line["linear_over"]),
        number(line["effective_rank"], ".1f"), number(line["samples_per_second"]), number(line["steps"]),
        number(line["seconds"], ".1f"),
    )  # fmt: skip


def markdown(made: Sequence[Numbers]) -> str:
    """Give the table as markdown."""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *map(texts, made)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def show(cells: Sequence[Numbers], references: Sequence[str], failed: Sequence[tuple[str, str]], path: Path) -> None:
    """Print the table, write it as markdown too, and say what failed and what is not clear."""
    made = lines(cells, references)
    table = Table(title=f"After {cells[0]['budget']:g} s of training" if cells else "Nothing was measured")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right", overflow="fold")
    for line in made:
        table.add_row(*texts(line))
    console: Any = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    console.print("sd: of the difference between one run of each, the root of the sum of both variances.")
    if unclear := not_clear(made):
        console.print(f"not more than {CLEAR:g} sd above untrained: {', '.join(unclear)}", markup=False)
    for label, why in failed:
        console.print(f"{label} failed: {why}", markup=False)
    path.write_text(markdown(made))
    console.print(f"The same as markdown: {path}", markup=False)
