"""Watch jobs to their end, with bars and the notable lines of their logs."""

import time
from collections.abc import Sequence
from typing import Any

from app.client import ENDED, Client
from app.commands.bars import JobBoard
from app.commands.call import Call, Exit

_INTERVAL = 0.5
_SHOWN = frozenset({"metric", "status", "checkpoint", "done"})  # the bars tell these already
_STYLES = {"warning": "yellow", "error": "red"}


def watch(client: Client, board: JobBoard, jobs: Sequence[str], *, quiet: bool = False) -> list[Any]:
    """Show the jobs until every one ended, and give them as they are then, in the same order.

    With `quiet` only warnings and errors of their logs are said.
    """
    last: dict[str, Any] = {}
    seen = dict.fromkeys(jobs, 0)
    while True:
        for job in jobs:
            if job in last and last[job]["status"] in ENDED:
                continue
            last[job] = client.jobs.get(job)
            board.show(last[job])
            for event in client.jobs.logged(job, after=seen[job]):
                seen[job] = event["number"]
                if event["level"] != "info" or not (quiet or event["type"] in _SHOWN):
                    board.say(f"{last[job]['name']}: {event['message']}", _STYLES.get(event["level"], "dim"))
        if all(last[job]["status"] in ENDED for job in jobs):
            return [last[job] for job in jobs]
        time.sleep(_INTERVAL)


def report_end(call: Call, job: Any) -> int:
    """Say how a job ended, and give the exit code for it: 0, or 3 for failed, or 4 for cancelled."""
    error = job.get("error")
    if error:
        call.out.tell(f"{job['name']} failed ({error['class']}, {error['code']}): {error['message']}", style="red")
        if error.get("hint"):
            call.out.tell(f"  {error['hint']}")
    if job["status"] == "failed":
        return Exit.JOB_FAILED
    return Exit.JOB_CANCELLED if job["status"] == "cancelled" else 0
