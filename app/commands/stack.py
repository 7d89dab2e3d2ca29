"""`tuneyard up`."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.client import home_folder
from app.commands.call import Exit, HomeOption, JsonOption, Output
from app.local import HomeTaken, Stack, StackError
from app.settings import Settings


def up(
    home: HomeOption = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, envvar="TUNEYARD_PORT", help="0 takes any free one.", show_default="8000"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start the one-machine stack and keep it running: Redis, the API, one worker, everything under the home.

    Prints `ready URL` when a job could be accepted and run. Ctrl-C ends it and everything it started.
    """
    out = Output(as_json=as_json)
    folder = home_folder(home)
    try:
        settings = Settings(mode="local", home=folder, port=8000 if port is None else port)  # type: ignore[call-arg]
    except ValidationError as error:
        out.error("; ".join(str(item["msg"]) for item in error.errors()))
        raise typer.Exit(Exit.USAGE) from None
    stack = Stack(folder, host=settings.host, port=settings.port, drain=settings.drain_seconds, tell=out.tell)
    out.tell(f"starting on {folder}")
    try:
        stack.run(lambda url: _ready(out, url, folder))
    except (HomeTaken, StackError, OSError) as error:
        out.error(str(error))
        raise typer.Exit(Exit.FAILURE) from None


def _ready(out: Output, url: str, folder: Path) -> None:
    if out.as_json:
        out.line({"ready": url, "home": str(folder)})
    else:
        print(f"ready {url}", flush=True)
