"""`tuneyard datasets`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from app.client import Misplaced
from app.commands import bars, tables, units
from app.commands.call import After, Call, Exit, Limit, command
from app.commands.references import dataset_id

group = typer.Typer(no_args_is_help=True, help="Upload data, see what was made of it.")

Reference = Annotated[str, typer.Argument(metavar="DATASET", help="Id, or name for its newest version.")]


@command(group, "push")
def push(
    call: Call,
    path: Annotated[Path | None, typer.Argument(help="Archive or folder; none with --builtin.")] = None,
    name: Annotated[str | None, typer.Option(help="Name; else that of the file.")] = None,
    builtin: Annotated[str | None, typer.Option(help="A standard set by name, such as digits.")] = None,
    task: Annotated[str | None, typer.Option(help="What the labels are for; else it is seen from the data.")] = None,
    on_error: Annotated[str | None, typer.Option(help="What a bad entry does: skip or fail.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the set is ready.")] = True,
) -> None:
    """Upload an archive or a folder, or take a standard set, and wait until it is ready."""
    if (path is None) == (builtin is None):
        raise typer.BadParameter("give a PATH, or --builtin NAME")
    if builtin is not None:
        made = call.client.datasets.create(name or builtin, builtin=builtin)
    else:
        assert path is not None
        if not path.exists():
            raise Misplaced(f"There is no file or folder {path}.")
        called = name or path.resolve().name.split(".")[0]
        with bars.transfer(call.out.news, f"uploading {path.name}") as advance:
            made = call.client.datasets.upload(path, called, task=task, on_error=on_error, advance=advance)
    if wait and made["status"] == "processing":
        made = _await(call, made)
    call.out.answer(made, lambda: show_one(made))
    if made["status"] == "failed":
        raise typer.Exit(Exit.FAILURE)


def _await(call: Call, made: Any) -> Any:
    if not call.out.news.is_terminal:
        return call.client.datasets.wait(made["id"])
    with call.out.news.status(f"checking {made['name']}"):
        return call.client.datasets.wait(made["id"])


@command(group, "list")
def list_(
    call: Call,
    name: Annotated[str | None, typer.Option(help="Only this name.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> None:
    """List datasets, newest first."""
    page = call.client.datasets.list(name=name, limit=limit, after=after)
    call.out.answer(page, lambda: show_list(page["data"]))


@command(group, "show")
def show(call: Call, dataset: Reference) -> None:
    """Show one dataset with its report."""
    found = call.client.datasets.get(dataset_id(call.client, dataset))
    call.out.answer(found, lambda: show_one(found))


@command(group, "delete")
def delete(call: Call, dataset: Reference) -> None:
    """Delete a dataset that no unfinished job needs."""
    gone = call.client.datasets.delete(dataset_id(call.client, dataset))
    call.out.answer(gone, f"deleted {gone['id']}")


def show_list(found: list[Any]) -> RenderableType:
    """Give datasets as a table."""
    rows = [
        [
            item["id"], escape(item["name"]), item["version"], units.status(item["status"]), item["task"],
            units.number(item["samples"]), len(item["classes"]), units.size(item["bytes"]),
            units.age(item["created_at"]),
        ]
        for item in found
    ]  # fmt: skip
    columns = ["id", "name", "version", "status", "task", "samples", "classes", "size", "made"]
    return tables.listing(columns, rows, numbers=["version", "samples", "classes", "size"])


def show_one(item: Any) -> RenderableType:
    """Give one dataset."""
    classes = ", ".join(escape(name) for name in item["classes"][:20])
    report = item.get("report") or {}
    return tables.facts(
        {
            "id": item["id"],
            "name": f"{escape(item['name'])}, version {item['version']}",
            "status": units.status(item["status"]),
            "error": tables.failure(item.get("error")),
            "task": item["task"],
            "format": item["format"],
            "size": units.size(item["bytes"]),
            "samples": units.number(item["samples"]),
            "splits": "  ".join(f"{split} {count:,}" for split, count in (item["splits"] or {}).items()),
            "classes": classes + (f" … ({len(item['classes'])})" if len(item["classes"]) > 20 else ""),
            **{f"report: {escape(str(name))}": _finding(value) for name, value in report.items()},
            "sha256": item["sha256"],
            "made": units.age(item["created_at"]),
        }
    )


def _finding(value: Any) -> str | None:
    """Give one entry of a report in a line or two; the whole of it stands in the JSON."""
    if isinstance(value, dict):
        return escape("  ".join(f"{key} {_short(item)}" for key, item in list(value.items())[:12])) or None
    if isinstance(value, list):
        return escape("; ".join(_short(item) for item in value[:5])) + (f" … ({len(value)})" if len(value) > 5 else "")
    return escape(_short(value))


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    text = units.number(value) if isinstance(value, int | float) else str(value)
    return text if len(text) <= 120 else text[:119] + "…"
