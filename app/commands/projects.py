"""`tuneyard projects`."""

from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from app.commands import tables, units
from app.commands.call import After, Call, Limit, command

group = typer.Typer(no_args_is_help=True, help="Projects; for operators.")


@command(group, "create")
def create(call: Call, name: Annotated[str, typer.Argument(help="Name of the project.")]) -> None:
    """Make a project; make its first key with `keys create --project`."""
    made = call.client.projects.create(name)
    call.out.answer(made, made["id"])


@command(group, "list")
def list_(call: Call, limit: Limit = 20, after: After = None) -> None:
    """List projects, newest first."""
    page = call.client.projects.list(limit=limit, after=after)
    call.out.answer(page, lambda: show_list(page["data"]))


@command(group, "delete")
def delete(call: Call, project: Annotated[str, typer.Argument(metavar="PROJECT", help="Id of the project.")]) -> None:
    """Delete a project."""
    gone = call.client.projects.delete(project)
    call.out.answer(gone, f"deleted {gone['id']}")


def show_list(found: list[Any]) -> RenderableType:
    """Give projects as a table."""
    rows = [[item["id"], escape(item["name"]), units.age(item["created_at"])] for item in found]
    return tables.listing(["id", "name", "made"], rows)
