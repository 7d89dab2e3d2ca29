"""`tuneyard recipes`."""

import json
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.json import JSON
from rich.markup import escape

from app.commands import tables
from app.commands.call import Call, command

group = typer.Typer(no_args_is_help=True, help="What can be run.")


@command(group, "list")
def list_(call: Call) -> None:
    """List the recipes that workers published."""
    page = call.client.recipes.list()
    call.out.answer(page, lambda: show_list(page["data"]))


@command(group, "show")
def show(call: Call, name: Annotated[str, typer.Argument(help="Name of the recipe.")]) -> None:
    """Show one recipe: its parameters, and a job to fill in."""
    found = call.client.recipes.get(name)
    call.out.answer(found, lambda: show_one(found))


def show_list(found: list[Any]) -> RenderableType:
    """Give recipes as a table."""
    rows = [[item["name"], item["kind"], item["version"], escape(item["summary"])] for item in found]
    return tables.listing(["name", "kind", "version", "summary"], rows)


def show_one(item: Any) -> RenderableType:
    """Give one recipe: facts, parameters with defaults, template."""
    head = tables.facts(
        {
            "name": f"{item['name']} {item['version']} ({item['kind']})",
            "": escape(item["summary"]),
            "tasks": ", ".join(item["tasks"]),
            "requires": escape(json.dumps({k: v for k, v in (item["requires"] or {}).items() if v})),
        }
    )
    rows = [
        [name, escape(json.dumps(field.get("default"))), escape(field.get("description", ""))]
        for name, field in parameters(item["schema"]).items()
    ]
    return Group(
        head, tables.listing(["parameter", "default", ""], rows), "A job to fill in:", JSON.from_data(item["template"])
    )


def parameters(schema: Any) -> dict[str, Any]:
    """Give the schema of each of a recipe's own parameters, by name."""
    node = schema.get("properties", {}).get("params", {})
    if "$ref" in node:
        node = schema.get("$defs", {}).get(node["$ref"].rpartition("/")[2], {})
    return node.get("properties", {})
