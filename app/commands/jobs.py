"""`tuneyard jobs`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from app.client import ENDED, Misplaced
from app.commands import tables, units
from app.commands.bars import JobBoard, job_fraction
from app.commands.call import After, Call, Limit, command
from app.commands.references import dataset_id
from app.commands.watching import report_end, watch

group = typer.Typer(no_args_is_help=True, help="Train: submit, watch, steer.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]


@command(group, "submit")
def submit(
    call: Call,
    spec: Annotated[
        str | None, typer.Argument(metavar="[SPEC]", help="JSON file with the job, or - to read it.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Which recipe; `tuneyard recipes list` shows them.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id, or name for its newest version.")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture, or id of a model or job to start from.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job and of its model.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="A field, as in training.epochs=3; can be repeated."),
    ] = None,
    watched: Annotated[bool, typer.Option("--watch", help="Watch it to its end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, and say what `auto` may come to.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Only measure memory, speed and time it would take.")
    ] = False,
) -> None:
    """Queue a job from a file, from options, or from a file changed by options."""
    body = read_spec(spec)
    body |= {key: value for key, value in {"recipe": recipe, "name": name}.items() if value is not None}
    if model is not None:
        body["model"] = model if model.startswith(("mdl_", "job_")) else {"architecture": model}
    for change in changes or ():
        set_field(body, change)
    if wanted := dataset or body.get("dataset"):
        body["dataset"] = dataset_id(call.client, wanted)
    if "recipe" not in body:
        raise typer.BadParameter("give a SPEC file or --recipe")
    if dry_run:
        checked = call.client.jobs.dry_run(body)
        call.out.answer(checked, lambda: json.dumps(checked, indent=2))
        return
    made = call.client.jobs.measure(body) if measure else call.client.jobs.submit(body)
    if watched or measure:
        if not call.out.as_json:
            call.out.tell(f"{made['id']} {made['status']}")
        _watch(call, [made["id"]])
    else:
        call.out.answer(made, made["id"])


def read_spec(place: str | None) -> dict[str, Any]:
    """Read a job from a JSON file or standard input; nothing gives an empty one."""
    if place is None:
        return {}
    try:
        body = json.loads(sys.stdin.read() if place == "-" else Path(place).read_text())
    except FileNotFoundError:
        raise Misplaced(f"There is no file {place}.") from None
    except (OSError, ValueError) as error:
        raise Misplaced(f"{place} is not a readable JSON file: {error}") from error
    if not isinstance(body, dict):
        raise Misplaced(f'{place} must hold a JSON object, as in {{"recipe": …}}.')
    return body


def set_field(body: dict[str, Any], change: str) -> None:
    """Lay `a.b=value` over a job; the value is JSON where it reads as JSON, else a string."""
    path, equals, text = change.partition("=")
    if not equals or not all(path.split(".")):
        raise typer.BadParameter(f"--set wants PATH=VALUE, as in training.epochs=3, not {change!r}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *folders, last = path.split(".")
    for folder in folders:
        inner = body.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise typer.BadParameter(f"--set {path}: {folder} is {inner!r}, not an object")
        body = inner
    body[last] = value


@command(group, "list")
def list_(
    call: Call,
    status: Annotated[str | None, typer.Option(help="Only this status.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Only this recipe.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: pretrain, finetune, apply, internal.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> None:
    """List jobs, newest first."""
    page = call.client.jobs.list(status=status, recipe=recipe, kind=kind, limit=limit, after=after)
    call.out.answer(page, lambda: show_list(page["data"]))


@command(group, "show")
def show(call: Call, job: JobId) -> None:
    """Show one job."""
    found = call.client.jobs.get(job)
    call.out.answer(found, lambda: show_one(found))


@command(group, "watch")
def watch_(call: Call, jobs: Annotated[list[str], typer.Argument(metavar="JOB…", help="Ids of jobs.")]) -> None:
    """Watch jobs to their end. Ctrl-C ends the watching, not the jobs.

    The exit code is 3 if a job failed, 4 if one was cancelled. With --json: one line per event, then each job.
    """
    _watch(call, jobs)


def _watch(call: Call, jobs: list[str]) -> None:
    if call.out.as_json:
        for job in jobs:
            for event in call.client.jobs.events(job):
                call.out.line(event)
        ended = [call.client.jobs.wait(job) for job in jobs]
        for job in ended:
            call.out.line(job)
    else:
        with JobBoard(call.out.console) as board:
            ended = watch(call.client, board, jobs)
        for job in ended:
            if job["metrics"]:
                call.out.console.print(tables.metrics(job["metrics"]))
            if job["model"]:
                call.out.console.print(f"model {job['model']}  (tuneyard models pull {job['model']})", highlight=False)
    code = max((report_end(call, job) for job in ended), default=0)
    if code:
        raise typer.Exit(code)


@command(group, "events")
def events(
    call: Call,
    job: JobId,
    after: Annotated[int, typer.Option(help="Only those with a higher number.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as they happen, to the end of the job.")
    ] = False,
) -> None:
    """Show the log of a job; with --json one line per event."""
    source = call.client.jobs.events(job, after=after) if follow else call.client.jobs.logged(job, after=after)
    for event in source:
        if call.out.as_json:
            call.out.line(event)
        else:
            shown = f"{event['number']:>4}  {event['created_at']}  {event['type']:<10}  {event['message']}"
            call.out.console.print(shown, markup=False, highlight=False, soft_wrap=True)


def _verb(name: str, text: str) -> None:
    def run(call: Call, job: JobId) -> None:
        answered = getattr(call.client.jobs, name)(job)
        wish = "" if answered["status"] in ENDED else f", wanted: {answered['wanted']}"
        call.out.answer(answered, f"{job} {answered['status']}{wish}")

    run.__doc__ = text
    command(group, name)(run)


_verb("cancel", "End a job and keep nothing but checkpoints.")
_verb("stop", "End a job early and keep its best model.")
_verb("pause", "Save a checkpoint and give the slot back.")
_verb("resume", "Queue a paused job again.")


@command(group, "retry")
def retry(
    call: Call,
    job: JobId,
    from_checkpoint: Annotated[bool, typer.Option("--from-checkpoint", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Make a new job like an ended one."""
    made = call.client.jobs.retry(job, from_checkpoint=from_checkpoint)
    call.out.answer(made, made["id"])


@command(group, "delete")
def delete(call: Call, job: JobId) -> None:
    """Delete an ended job."""
    gone = call.client.jobs.delete(job)
    call.out.answer(gone, f"deleted {gone['id']}")


@command(group, "pull")
def pull(
    call: Call,
    job: JobId,
    to: Annotated[Path | None, typer.Option(help="Folder; else one named after the job.")] = None,
) -> None:
    """Download what a job made besides its model."""
    paths = call.client.jobs.download(job, to or Path(job))
    call.out.answer({"files": [str(path) for path in paths]}, "\n".join(map(str, paths)) or "it made no files")


def show_list(found: list[Any]) -> RenderableType:
    """Give jobs as a table."""
    rows = [
        [
            item["id"], escape(item["name"]), item["recipe"], units.status(item["status"]),
            f"{job_fraction(item):.0%}", best(item), units.age(item["created_at"]),
        ]
        for item in found
    ]  # fmt: skip
    columns = ["id", "name", "recipe", "status", "done", "best", "made"]
    return tables.listing(columns, rows, numbers=["done"])


def best(item: Any) -> str:
    """Give a job's best metric, or its test or train value, in a cell."""
    if item.get("best"):
        return f"{item['best']['metric']} {units.number(item['best']['value'])}"
    return ""


def show_one(item: Any) -> RenderableType:
    """Give one job."""
    progress, plan = item.get("progress") or {}, item.get("plan") or {}
    reason = f"  ({item['status_reason']})" if item["status_reason"] else ""
    place = (item.get("queue") or {}).get("position")
    return tables.facts(
        {
            "id": item["id"],
            "name": escape(item["name"]),
            "recipe": f"{item['recipe']} {item['recipe_version']}",
            "status": units.status(item["status"]) + reason + (f"  place {place}" if place is not None else ""),
            "wanted": item["wanted"] if item["wanted"] != "run" else None,
            "error": tables.failure(item["error"]),
            "dataset": item["dataset"],
            "progress": "  ".join(
                f"{key} {units.number(value) if isinstance(value, int | float) else value}"
                for key, value in progress.items()
                if value is not None and key != "updated_at"
            ),
            "metrics": tables.metrics(item["metrics"] or {}),
            "best": best(item),
            "model": item["model"],
            "attempt": f"{item['attempt']} of {item['max_attempts']}" + ("" if item["exact"] else ", not exact"),
            "plan": escape(json.dumps(plan)) if plan else None,
            "result": escape(json.dumps(item["result"])) if item["result"] else None,
            "worker": item["worker"],
            "made": units.age(item["created_at"]),
            "started": units.age(item["started_at"]) if item["started_at"] else None,
            "ended": units.age(item["finished_at"]) if item["finished_at"] else None,
        }
    )
