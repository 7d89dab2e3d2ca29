"""Progress while something goes on: bars on a terminal, plain lines elsewhere, nothing in the way of JSON."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from app.client import ENDED
from app.commands import units

_LINE_SECONDS = 5.0  # between plain lines about the same job, unless its status or phase changes


@contextmanager
def transfer(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Show one file on its way; gives the callback that the client's transfers want."""
    if not console.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def job_facts(job: Any) -> dict[str, str]:
    """Give what a line about a job says: `phase`, `steps`, `loss`, `speed`, `eta`; empty where it is not known."""
    progress, metrics = job.get("progress") or {}, job.get("metrics") or {}
    step, steps = progress.get("step"), progress.get("steps")
    loss = metrics.get("train/loss", metrics.get("validation/loss"))
    speed, eta = progress.get("samples_per_second"), progress.get("eta_seconds")
    ended = job["status"] in ENDED
    return {
        "phase": (progress.get("phase") or "") if job["status"] == "running" else "",
        "steps": f"{step:,}/{steps:,}" if step is not None and steps else "",
        "loss": f"loss {units.number(loss)}" if loss is not None else "",
        "speed": f"{speed:,.0f} samples/s" if speed and not ended else "",
        "eta": f"ETA {units.duration(eta)}" if eta is not None and not ended else "",
    }


def job_fraction(job: Any) -> float:
    """Give how much of a job is done, 0 to 1."""
    if job["status"] in {"succeeded", "stopped"}:
        return 1.0
    return float((job.get("progress") or {}).get("fraction") or 0.0)


def job_line(job: Any) -> str:
    """Give one plain line about a job."""
    facts = job_facts(job)
    words = [job["name"], job["status"], facts["phase"], f"{job_fraction(job):.0%}", *list(facts.values())[1:]]
    reason = job.get("status_reason")
    return "  ".join(word for word in words if word) + (f"  ({reason})" if reason else "")


class JobBoard:
    """A bar per job, or plain lines; use as a block and call `show` with every job as often as wanted."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, tuple[tuple[str, ...], float]] = {}
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                TextColumn("{task.fields[status]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[facts]}"),
                console=console,
            )

    def __enter__(self) -> "JobBoard":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, job: Any) -> None:
        """Bring one job up to date."""
        if self._progress:
            facts = job_facts(job)
            self._progress.update(
                self._task(job),
                completed=job_fraction(job),
                status=units.status(job["status"]),
                facts="  ".join(word for word in facts.values() if word),
            )
            return
        state = (job["status"], job_facts(job)["phase"], str(job.get("status_reason")))
        before, at = self._said.get(job["id"], ((), 0.0))
        now = time.monotonic()
        if state != before or (now - at > _LINE_SECONDS and job["status"] == "running"):
            self._said[job["id"]] = (state, now)
            self._console.print(job_line(job), markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        """Put one line above the bars."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _task(self, job: Any) -> TaskID:
        assert self._progress is not None
        if job["id"] not in self._tasks:
            self._tasks[job["id"]] = self._progress.add_task(job["name"], total=1.0, status="", facts="")
        return self._tasks[job["id"]]
