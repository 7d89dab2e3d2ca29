"""How answers look: tables for lists, two columns for one object."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from app.commands import units


def listing(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Sequence[str] = ()) -> Table:
    """Give a table with a head; columns named in `numbers` are right-aligned. Cells are rich markup."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name = column in {"id", "status"}  # never broken: it is copied
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold", no_wrap=name)
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    return table


def facts(pairs: Mapping[str, Any]) -> Table:
    """Give one object as name and value; what is None or empty is left out. Values are rich markup."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        if value is not None and value != "" and value != {} and value != []:
            table.add_row(name, str(value))
    return table


def metrics(values: Mapping[str, float | None]) -> str:
    """Give metrics by name in one cell, a line each."""
    return "\n".join(f"{escape(name)}  {units.number(value)}" for name, value in sorted(values.items()))


def failure(error: Mapping[str, Any] | None) -> str | None:
    """Give an object's `error` in one cell."""
    if not error:
        return None
    hint = f"\n{escape(error['hint'])}" if error.get("hint") else ""
    return f"[red]{escape(error['class'])}, {escape(error['code'])}[/]: {escape(error['message'])}{hint}"
