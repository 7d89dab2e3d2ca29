"""`tuneyard worker` and `tuneyard workers`."""

import os
import sys
from typing import Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from app.commands import tables
from app.commands.call import Call, HomeOption, command

group = typer.Typer(no_args_is_help=True, help="The hosts that train.")


@command(group, "list")
def list_(call: Call) -> None:
    """List workers."""
    page = call.client.workers()
    call.out.answer(page, lambda: show_list(page["data"]))


def worker(home: HomeOption = None) -> None:
    """Be a worker: train jobs until a signal asks for the end. Configured by TUNEYARD_* variables."""
    environment = os.environ | ({"TUNEYARD_HOME": str(home)} if home else {})
    # It becomes this process, so signals and exit codes are its own.
    os.execve(sys.executable, [sys.executable, "-m", "worker.main"], environment)  # noqa: S606 - our own interpreter


def show_list(found: list[Any]) -> RenderableType:
    """Give workers as a table."""
    rows = [
        [
            item["id"], escape(item["host"]), f"{item['busy']}/{item['slots']}",
            ", ".join(escape(str(gpu.get("name", "GPU"))) for gpu in item["gpus"]) or "none",
            (item["versions"] or {}).get("torch"),
            "gone" if not item["alive"] else "draining" if item["draining"] else "ready",
        ]
        for item in found
    ]  # fmt: skip
    return tables.listing(["id", "host", "busy", "GPUs", "torch", "state"], rows, numbers=["busy"])
