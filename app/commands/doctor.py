"""`tuneyard doctor`."""

from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress import Progress

from app.client import home_folder
from app.commands import tables, units
from app.commands.call import Exit, HomeOption, JsonOption, Output
from app.local import compute, health
from app.settings import Settings


def doctor(
    home: HomeOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time small networks for 20 s; `auto` uses it from the next job on.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="With --measure: time compiled networks too, a minute or two more.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine lacks, and how to get it. The exit code is 1 when something needed is missing."""
    out = Output(as_json=as_json)
    if measure:
        _measure(out, Settings(home=home_folder(home)), compiled=compiled)  # type: ignore[call-arg]
        return
    findings = [finding.to_json() for finding in health.examine(home_folder(home))]
    out.answer({"ok": not _missing(findings), "findings": findings}, lambda: show(findings))
    if _missing(findings):
        raise typer.Exit(Exit.FAILURE)


def show(findings: list[Any]) -> RenderableType:
    """Give the findings as a table, with what to do below."""
    rows = [[units.status(item["state"]), item["name"], escape(item["message"])] for item in findings]
    todo = [f"[bold]{item['name']}[/]: {escape(item['remedy'])}" for item in findings if item["remedy"]]
    verdict = "Something that is needed is missing." if _missing(findings) else "Everything that is needed is there."
    return Group(tables.listing(["", "what", "found"], rows), *todo, verdict)


def show_measured(found: dict[str, Any]) -> RenderableType:
    """Give what was measured, the fastest way of each family in bold."""
    rows: list[list[str]] = []
    for family in dict.fromkeys(row["family"] for row in found["rows"]):
        own = sorted(
            (row for row in found["rows"] if row["family"] == family), key=lambda row: -row["samples_per_second"]
        )
        for row in own:
            cells = [
                family, row["precision"], row["memory_format"], str(row["threads"]), "yes" if row["compile"] else "no",
                f"{row['samples_per_second']:,.0f}",
            ]  # fmt: skip
            rows.append([f"[bold]{cell}[/]" for cell in cells] if row is own[0] else cells)
    heads = ["network", "precision", "memory format", "threads", "compiled", "samples/s"]
    return Group(
        tables.listing(heads, rows, numbers=["threads", "samples/s"]),
        f"Written to {found['memo']}. Jobs that begin from now on use it wherever they say auto, until torch or the "
        "processor is another. Measure again when the machine is idle if it was not.",
    )


def _measure(out: Output, settings: Settings, *, compiled: bool) -> None:
    threads = settings.threads or max(1, int(compute.cores()) // settings.slots)
    rows, last = list[dict[str, Any]](), dict[str, Any]()
    try:
        with Progress(console=out.news, transient=True) as progress:
            task = progress.add_task("measuring", total=None)
            for said in compute.measure(settings.home_path / "cache", threads, compiled=compiled):
                last = said
                if "row" in said:
                    rows.append(said["row"])
                    progress.update(task, completed=said["done"], total=said["of"])
    except compute.MeasuringFailed as error:
        out.error(f"Nothing was measured: {error}")
        raise typer.Exit(Exit.FAILURE) from None
    found = {**last, "rows": rows}
    out.answer(found, lambda: show_measured(found))


def _missing(findings: list[Any]) -> bool:
    return any(item["state"] == "missing" for item in findings)
