"""`tuneyard run`: one job on this machine, with no server."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.client import home_folder
from app.commands.bars import JobBoard
from app.commands.call import Exit, HomeOption, JsonOption, Output
from app.commands.tables import metrics


def run(
    spec: Annotated[Path, typer.Argument(help="JSON file with the job; no `dataset` needed.")],
    data: Annotated[str, typer.Option(help="Folder or archive with the images, or builtin:NAME, as builtin:digits.")],
    out: Annotated[Path, typer.Option(help="Where the weights and result.json go.")] = Path("tuneyard-run"),
    model: Annotated[
        Path | None, typer.Option(help="Folder with the model.safetensors and config.json to start from or to use.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many train together, sharing every batch; on GPUs, one for each.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train on a folder with no server, no database and no queue. Ctrl-C keeps the best model so far.

    Decoded images are kept in the home's cache, where the next run finds them, and so do jobs of its stack.
    """
    output = Output(as_json=as_json)
    for path in (spec, *([] if data.startswith("builtin:") else [Path(data)]), *([model] if model else [])):
        if not path.exists():
            output.error(f"There is no file or folder {path}.")
            raise typer.Exit(Exit.USAGE)
    command = [sys.executable, "-m", "worker.trainer", "run", str(spec), "--data", data, "--out", str(out)]
    command += ["--cache", str(home_folder(home) / "cache")]
    command += ["--model", str(model)] if model else []
    command += ["--processes", str(processes)] if processes else []
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert trainer.stdout is not None
    view = LocalRun(spec.stem)
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer.stdout)
        board = None if as_json else stack.enter_context(JobBoard(output.console))
        signal.signal(signal.SIGINT, lambda *_: trainer.send_signal(signal.SIGINT))
        signal.signal(signal.SIGTERM, lambda *_: trainer.terminate())
        for line in trainer.stdout:
            if as_json:
                sys.stdout.write(line)
                sys.stdout.flush()
            said = view.hear(json.loads(line))
            if board is not None:
                board.show(view.job)
                if said:
                    board.say(said, "dim")
    code = trainer.wait()
    if not as_json and view.job["metrics"]:
        output.console.print(metrics(view.job["metrics"]))
        output.tell(f"written to {out}")
    if view.job["error"]:
        error = view.job["error"]
        output.tell(f"failed ({error['class']}, {error['code']}): {error['message']}", style="red")
        raise typer.Exit(Exit.JOB_FAILED)
    if code != 0:
        killed = " (killed: where memory ran out, set a smaller training.batch_size)" if code == -signal.SIGKILL else ""
        output.tell(f"the trainer ended with exit code {code}{killed}", style="red")
        raise typer.Exit(Exit.FAILURE)


class LocalRun:
    """What a trainer's messages come to, in the shape of a job, so that one board shows both."""

    def __init__(self, name: str) -> None:
        self.job: dict[str, Any] = {
            "id": name, "name": name, "status": "starting", "progress": None, "metrics": {}, "error": None,
        }  # fmt: skip

    def hear(self, message: dict[str, Any]) -> str | None:
        """Take one message in; give a line to say, if it is worth one."""
        match message["type"]:
            case "progress":
                self.job |= {"status": "running", "progress": message}
            case "metrics":
                self.job["metrics"] |= {name: value for name, _step, value in message["rows"]}
            case "event":
                return message["message"]
            case "finished":
                self.job["metrics"] |= message["metrics"]
                self.job["status"] = message["outcome"]
                return (message.get("result") or {}).get("sentence")
            case "failed":
                self.job |= {"status": "failed", "error": _public(message["error"])}
        return None


def _public(error: dict[str, Any]) -> dict[str, Any]:
    return {"class": error.get("fault", error.get("class")), **error}
