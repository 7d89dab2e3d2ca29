"""From pairs to lines: medians, spreads, whether the goal was met, the JSON and the table."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import shares
from tests.benchmarks.pairs import Numbers, Pair, Quality, Workload

_COLOURS = {True: "green", False: "red", None: "yellow"}
POINTS_BELOW, LOSS_ABOVE = 0.5, 0.01  # what ours may be worse where speed is compared; hundredths, and a part


def line(
    workload: Workload, found: Sequence[Pair], seconds: float, *, options: str = "", pictures: bool = True
) -> Numbers:
    """Sum up the pairs of a workload; `options` is what `make bench` was given beside its name.

    Without real `pictures` no accuracy is kept, and a goal that asks for one is not met.
    """
    ratios = [workload.ratio(pair) for pair in found]
    qualities = [pair.quality for pair in found if pair.quality is not None]
    if senseless := bool(qualities) and workload.quality == "accuracy" and not pictures:
        qualities, found = [], [replace(pair, quality=None) for pair in found]
    row: Numbers = {
        "name": workload.name,
        "ours": statistics.median(pair.ours for pair in found),
        "other": statistics.median(pair.other for pair in found),
        "unit": workload.unit,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "quality": None,
        "pairs": len(found),
        "command": f"make bench ONLY={workload.name} {options}".strip(),
        "ratio_is": "other / ours" if workload.compare == "time" else "ours / other",
        "goal": {"most" if workload.smaller_is_better else "least": workload.goal},
        "bound": any(pair.bound for pair in found),
        "seconds": round(seconds, 1),
        "more": _medians(found),
    }
    if qualities:
        sides = {"ours": [mine for mine, _ in qualities], "other": [theirs for _, theirs in qualities]}
        row["quality"] = {side: statistics.fmean(values) for side, values in sides.items()}
        row["quality_spread"] = {side: _spread(values) for side, values in sides.items()}
    if workload.compare == "quality":
        row["goal"] = {"most_points_below": workload.goal}
    row["met"] = _met(workload, row, found)
    if senseless:
        row |= {"speed_met": row["met"], "met": None if row["met"] else False}
    if workload.as_good_as is not None:
        row |= {"as_good_as": workload.as_good_as, "speed_met": row["met"]}
    return compared([row])[0]


def compared(rows: Sequence[Numbers]) -> list[Numbers]:
    """Give to every line that is only timed the quality which its own line of this run found.

    Its goal is met where both are. Without that line it is not (false) where it is too slow, and null where it is fast.
    """
    known = {row["name"]: row for row in rows}
    return [_beside(row, known.get(row["as_good_as"])) if "as_good_as" in row else row for row in rows]


def _beside(row: Numbers, other: Numbers | None) -> Numbers:
    if other is None:
        return {**row, "met": None if row["speed_met"] else False}
    found = {name: other[name] for name in ("quality", "quality_spread") if name in other}
    return {**row, **found, "quality_pairs": other["pairs"], "met": row["speed_met"] and other["met"]}


def _met(workload: Workload, row: Numbers, found: Sequence[Pair]) -> bool:
    if workload.compare == "quality":
        return _as_good([(pair.ours, pair.other) for pair in found], "accuracy", workload.goal)
    median = row["ratio"]["median"]
    good = median <= workload.goal if workload.smaller_is_better else median >= workload.goal
    qualities = [pair.quality for pair in found if pair.quality is not None]
    good = good and (not qualities or _as_good(qualities, workload.quality))
    return good and all(row["more"][name] <= most for name, most in workload.limits)


def _as_good(found: Sequence[tuple[float, float]], kind: Quality, points: float = POINTS_BELOW) -> bool:
    """Say whether ours is worse by at most what is allowed, or by what the seeds explain.

    They explain two standard errors of the paired difference.
    """
    worse = [theirs - mine if kind == "accuracy" else mine - theirs for mine, theirs in found]
    allowed = points / 100 if kind == "accuracy" else LOSS_ABOVE * statistics.fmean(theirs for _, theirs in found)
    return statistics.fmean(worse) <= max(allowed, 2 * _spread(worse) / len(worse) ** 0.5)


def _medians(found: Sequence[Pair]) -> Numbers:
    names = dict.fromkeys(name for pair in found for name in pair.more)
    medians = {name: statistics.median(pair.more[name] for pair in found if name in pair.more) for name in names}
    return {**medians, **found[-1].summary}


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def write(rows: Sequence[Numbers], path: Path) -> None:
    """Write the lines that were measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=2) + "\n")


def table(rows: Sequence[Numbers], failed: Sequence[tuple[str, str]], left_out: Sequence[str]) -> Table:
    """Give the table; below it what failed and what was left out."""
    made = Table(title="Ours against the other way, both in this run", caption=_caption(failed, left_out))
    made.caption_justify = "left"
    for heading in ("workload", "ours", "other", "unit", "ratio", "min to max", "goal", "quality: ours / other"):
        made.add_column(heading, justify="left" if heading == "workload" else "right", overflow="fold")
    for row in rows:
        ratio = row["ratio"]
        colour = _COLOURS[row["met"]]
        sign = ">= " if row["bound"] else ""
        made.add_row(
            row["name"], _number(row["ours"]), _number(row["other"]), row["unit"],
            f"[{colour}]{sign}{_number(ratio['median'])}[/]", f"{_number(ratio['min'])} to {_number(ratio['max'])}",
            _goal(row["goal"]), _quality(row),
        )  # fmt: skip
    return made


def _caption(failed: Sequence[tuple[str, str]], left_out: Sequence[str]) -> str:
    lines = ["rates: ours / other; times (s, ms): other / ours; where the goal says 'at most', smaller is better"]
    lines += [f"[red]{name} failed:[/] {why}" for name, why in failed]
    if left_out:
        lines.append(f"only when asked for, by make bench ONLY=name,name DATA=…: {', '.join(left_out)}")
    return "\n".join(lines)


def _goal(goal: Numbers) -> str:
    ((kind, value),) = goal.items()
    if kind == "most_points_below":
        return f"{value:g} points below, at most"
    return f"at {kind} {value:g}"


def _quality(row: Numbers) -> str:
    quality, spread = row["quality"], row.get("quality_spread", {})
    if not quality and "speed_met" in row:
        return f"{'speed met' if row['speed_met'] else 'too slow'}; quality not compared in this run"
    if not quality:
        return ""
    many = row.get("quality_pairs", row["pairs"]) > 1
    return " / ".join(f"{quality[side]:.4g}" + (f" ± {spread[side]:.2g}" if many else "") for side in ("ours", "other"))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def show(rows: Sequence[Numbers], failed: Sequence[tuple[str, str]], left_out: Sequence[str]) -> None:
    """Print the table."""
    console: Any = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table(rows, failed, left_out))
    if (parts := shares.breakdown(rows)) is not None:
        console.print(parts)
