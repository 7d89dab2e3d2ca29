"""One call of the command line: where it goes, how it answers, how it ends.

Every command that talks to a server is declared with `@command(group, "name")`, takes a `Call` first, and gets the
options `--home --url --key --json` for it.
"""

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from app.client import Client, ClientError, Refused


class Exit(IntEnum):
    """Exit codes, the same for every command."""

    FAILURE = 1
    USAGE = 2
    JOB_FAILED = 3
    JOB_CANCELLED = 4
    INTERRUPTED = 130


HomeOption = Annotated[
    Path | None,
    typer.Option("--home", envvar="TUNEYARD_HOME", help="Folder of the one-machine stack.", show_default="~/.tuneyard"),
]
UrlOption = Annotated[
    str | None, typer.Option("--url", envvar="TUNEYARD_URL", help="The server.", show_default="that of the home")
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", envvar="TUNEYARD_KEY", help="API key.", show_default="that of the home"),
]
# What every `list` takes.
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many.")]
After = Annotated[str | None, typer.Option(help="Go on after this id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON on standard output, and nothing else there.")]


class Output:
    """What a command says: JSON for programs, or tables and lines for people. News always goes to standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # A pipe has no width to fit: lines stay whole for grep and awk.
        self.console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240)
        self.news = Console(stderr=True)

    def answer(self, value: Any, shown: Callable[[], RenderableType] | RenderableType) -> None:
        """Give the answer of the command: `value` as JSON, or what is shown of it."""
        if self.as_json:
            self.line(value)
        else:
            self.console.print(shown() if callable(shown) else shown)

    def line(self, value: Any) -> None:
        """Give one line of JSON."""
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def tell(self, text: str, *, style: str | None = None) -> None:
        """Give one line of news."""
        self.news.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def error(self, message: str, body: dict[str, Any] | None = None) -> None:
        """Say what went wrong: on standard error, and as the error body where JSON is asked for."""
        if self.as_json:
            self.line({"error": body or {"message": message}})
        self.news.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        for detail in (body or {}).get("details") or ():
            self.news.print(
                f"  [bold]{escape(detail['pointer'])}[/]: {escape(detail['message'])}", highlight=False, soft_wrap=True
            )
        if request := (body or {}).get("request_id"):
            self.news.print(f"  [dim]request {escape(request)}[/]", highlight=False)


class Call:
    """A client that is opened when it is first needed, and an output."""

    def __init__(self, home: Path | None, url: str | None, key: str | None, *, as_json: bool) -> None:
        self._place = (url, key, home)
        self.out = Output(as_json=as_json)

    @functools.cached_property
    def client(self) -> Client:
        """The connection to the server."""
        url, key, home = self._place
        return Client(url, key, home=home)

    def close(self) -> None:
        """Give the sockets back, if any were opened."""
        if "client" in self.__dict__:
            self.client.close()


def command(group: typer.Typer, name: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a command of `group` that takes a `Call` first."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        group.command(name, **options)(_with_call(function))
        return function

    return declare


def _with_call(function: Callable[..., None]) -> Callable[..., None]:
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    common = {"its_home": HomeOption, "its_url": UrlOption, "its_key": KeyOption, "as_json": JsonOption}
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "as_json" else None, annotation=kind
        )
        for name, kind in common.items()
    ]

    @functools.wraps(function)
    def run(*, its_home: Path | None, its_url: str | None, its_key: str | None, as_json: bool, **given: Any) -> None:
        call = Call(its_home, its_url, its_key, as_json=as_json)
        with ending(call.out), contextlib.closing(call):
            function(call, **given)

    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *added]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


class ending:  # noqa: N801 - used as a block
    """Turn what can go wrong in a command into a message and an exit code."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        match error:
            case Refused():
                self._out.error(error.message, error.body)
            case ClientError():
                self._out.error(str(error))
            case KeyboardInterrupt():
                raise typer.Exit(Exit.INTERRUPTED)
            case BrokenPipeError():  # the reader of our output has seen enough
                sys.stderr.close()
                raise typer.Exit(Exit.FAILURE)
            case _:
                return
        raise typer.Exit(Exit.FAILURE)
