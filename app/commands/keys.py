"""`tuneyard keys`."""

from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from app.commands import tables, units
from app.commands.call import After, Call, Limit, command

group = typer.Typer(no_args_is_help=True, help="API keys.")


@command(group, "create")
def create(
    call: Call,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, write or admin; can be repeated.", show_default="read, write"),
    ] = None,
    project: Annotated[str | None, typer.Option(help="Id of another project; an operator's key may name one.")] = None,
) -> None:
    """Make a key and show its secret, once."""
    made = call.client.keys.create(name, scopes=scopes or ["read", "write"], project=project)
    call.out.answer(made, made["key"])
    if not call.out.as_json:
        call.out.tell("Keep it: it is not shown again.")


@command(group, "list")
def list_(call: Call, limit: Limit = 20, after: After = None) -> None:
    """List keys, newest first."""
    page = call.client.keys.list(limit=limit, after=after)
    call.out.answer(page, lambda: show_list(page["data"]))


@command(group, "revoke")
def revoke(call: Call, key: Annotated[str, typer.Argument(metavar="KEY", help="Id of the key.")]) -> None:
    """End a key at once."""
    gone = call.client.keys.revoke(key)
    call.out.answer(gone, f"revoked {gone['id']}")


def show_list(found: list[Any]) -> RenderableType:
    """Give keys as a table."""
    rows = [
        [
            item["id"],
            escape(item["name"]),
            f"{item['prefix']}…",
            ", ".join(item["scopes"]),
            units.age(item["created_at"]),
        ]
        for item in found
    ]
    return tables.listing(["id", "name", "key", "scopes", "made"], rows)
