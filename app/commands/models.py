"""`tuneyard models`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from app.commands import bars, tables, units
from app.commands.call import After, Call, Exit, Limit, command
from app.commands.references import model_id

group = typer.Typer(no_args_is_help=True, help="Trained weights: find, download, bring in.")

Reference = Annotated[str, typer.Argument(metavar="MODEL", help="Id, or name for its newest version.")]


@command(group, "list")
def list_(
    call: Call,
    name: Annotated[str | None, typer.Option(help="Only this name.")] = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> None:
    """List models, newest first."""
    page = call.client.models.list(name=name, task=task, limit=limit, after=after)
    call.out.answer(page, lambda: show_list(page["data"]))


@command(group, "show")
def show(call: Call, model: Reference) -> None:
    """Show one model."""
    found = call.client.models.get(model_id(call.client, model))
    call.out.answer(found, lambda: show_one(found))


@command(group, "pull")
def pull(
    call: Call,
    model: Reference,
    to: Annotated[Path | None, typer.Option(help="Folder; else one named after the model.")] = None,
) -> None:
    """Download a model's files and verify their digests; goes on where an earlier call was cut off."""
    found = call.client.models.get(model_id(call.client, model))
    folder = to or Path(f"{found['name']}-v{found['version']}")
    paths: list[Path] = []
    for file in call.client.models.files(found["id"]):
        with bars.transfer(call.out.news, file["name"]) as advance:
            paths.append(call.client.models.fetch(found["id"], file, folder, advance=advance))
    answer = {"model": found["id"], "folder": str(folder), "files": [str(path) for path in paths]}
    call.out.answer(answer, "\n".join(map(str, paths)))


@command(group, "import")
def import_(
    call: Call,
    path: Annotated[Path, typer.Argument(help="A safetensors file.")],
    architecture: Annotated[str, typer.Option(help="Name, or a JSON object with its options.")],
    name: Annotated[str | None, typer.Option(help="Name; else that of the file.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in order, separated by commas.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it was checked.")] = True,
) -> None:
    """Bring in weights; they are checked against the architecture."""
    try:
        built = json.loads(architecture) if architecture.startswith("{") else {"architecture": architecture}
    except ValueError as error:
        raise typer.BadParameter(f"--architecture is not JSON: {error}") from error
    with bars.transfer(call.out.news, f"uploading {path.name}") as advance:
        made = call.client.models.import_(
            path,
            name or path.stem,
            architecture=built,
            classes=classes.split(",") if classes else None,
            advance=advance,
        )
    if wait:
        made = call.client.models.wait(made["id"])
    call.out.answer(made, lambda: show_one(made))
    if made["status"] == "failed":
        raise typer.Exit(Exit.FAILURE)


@command(group, "delete")
def delete(call: Call, model: Reference) -> None:
    """Delete a model; its lineage stays known."""
    gone = call.client.models.delete(model_id(call.client, model))
    call.out.answer(gone, f"deleted {gone['id']}")


def show_list(found: list[Any]) -> RenderableType:
    """Give models as a table."""
    rows = [
        [
            item["id"], escape(item["name"]), item["version"], units.status(item["status"]), item["task"],
            architecture_name(item), units.number(item["parameters"]), headline(item), units.age(item["created_at"]),
        ]
        for item in found
    ]  # fmt: skip
    columns = ["id", "name", "version", "status", "task", "architecture", "parameters", "metric", "made"]
    return tables.listing(columns, rows, numbers=["version", "parameters"])


def architecture_name(item: Any) -> str | None:
    """Give the name of what a model is built of."""
    built = item.get("architecture")
    return built.get("architecture") if isinstance(built, dict) else built


def headline(item: Any) -> str:
    """Give the metric that says most about a model."""
    for name in ("test/accuracy", "validation/accuracy", "probe/knn_accuracy", "validation/loss"):
        if item["metrics"].get(name) is not None:
            return f"{name} {units.number(item['metrics'][name])}"
    return ""


def show_one(item: Any) -> RenderableType:
    """Give one model."""
    built = item.get("architecture")
    return tables.facts(
        {
            "id": item["id"],
            "name": f"{escape(item['name'])}, version {item['version']}",
            "status": units.status(item["status"]),
            "error": tables.failure(item.get("error")),
            "task": item["task"],
            "architecture": escape(json.dumps(built)) if isinstance(built, dict) else built,
            "parameters": units.number(item["parameters"]),
            "classes": ", ".join(escape(name) for name in (item["classes"] or [])[:20]),
            "metrics": tables.metrics(item["metrics"] or {}),
            "files": "\n".join(f"{escape(f['name'])}  {units.size(f['bytes'])}" for f in item["files"]),
            "lineage": "\n".join(f"{key} {value}" for key, value in (item["lineage"] or {}).items() if value),
            "visibility": item["visibility"],
            "made": units.age(item["created_at"]),
        }
    )
