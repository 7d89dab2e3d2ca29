"""`tuneyard doctor`."""

from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

from app.client import home_folder
from app.commands import tables, units
from app.commands.call import Exit, HomeOption, JsonOption, Output
from app.local import health


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what this machine lacks, and how to get it. The exit code is 1 when something needed is missing."""
    out = Output(as_json=as_json)
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


def _missing(findings: list[Any]) -> bool:
    return any(item["state"] == "missing" for item in findings)
