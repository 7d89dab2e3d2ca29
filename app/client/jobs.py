"""Jobs over the API: submit, watch, steer."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.client.connection import LOST, Connection, Patience
from app.client.objects import ENDED, Checkpoint, Event, File, Job, Json, Page, Series, Spec
from app.client.transfer import Advance, fetch_file
from app.client.waiting import each, until


class Jobs:
    """One run of a recipe each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def submit(self, spec: Spec) -> Job:
        """Queue a job; sent again after a lost connection, it is still one job."""
        return self._connection.post("/v1/jobs", spec)

    def dry_run(self, spec: Spec) -> Json:
        """Check a spec and give `{spec, plan, warnings}`; nothing runs."""
        return self._connection.post("/v1/jobs", spec, dry_run="true")

    def measure(self, spec: Spec) -> Job:
        """Run a spec for a few steps; the job's `result` is what a full run would take."""
        return self._connection.post("/v1/jobs", spec, dry_run="measure")

    def get(self, job: str) -> Job:
        """Give one job."""
        return self._connection.get(f"/v1/jobs/{job}")

    def list(self, *, limit: int = 20, after: str | None = None, **filters: Any) -> Page[Job]:
        """Give one page, newest first; filters: `status`, `recipe`, `parent`, `kind`, `metadata`, `order`."""
        return self._connection.get("/v1/jobs", limit=limit, after=after, **filters)

    def each(self, **filters: Any) -> Iterator[Job]:
        """Give them all, page by page."""
        return each(self.list, **filters)

    def wait(self, job: str, *, timeout: float | None = None, on_change: Callable[[Job], None] | None = None) -> Job:
        """Wait until the job ended, however it ended, or until `timeout` seconds passed; give it as it is then."""
        return until(
            self._connection, f"/v1/jobs/{job}", lambda item: item["status"] in ENDED,
            timeout=timeout, on_change=on_change,
        )  # fmt: skip

    def cancel(self, job: str) -> Job:
        """End it and keep nothing but checkpoints."""
        return self._connection.post(f"/v1/jobs/{job}/cancel")

    def stop(self, job: str) -> Job:
        """End it early and keep its best model."""
        return self._connection.post(f"/v1/jobs/{job}/stop")

    def pause(self, job: str) -> Job:
        """Save a checkpoint and give the slot back, until `resume`."""
        return self._connection.post(f"/v1/jobs/{job}/pause")

    def resume(self, job: str) -> Job:
        """Queue a paused job again."""
        return self._connection.post(f"/v1/jobs/{job}/resume")

    def retry(self, job: str, *, from_checkpoint: bool = False) -> Job:
        """Make a new job like an ended one, from its last checkpoint if asked."""
        return self._connection.post(f"/v1/jobs/{job}/retry", {"from_checkpoint": from_checkpoint})

    def delete(self, job: str) -> Json:
        """Delete an ended job."""
        return self._connection.delete(f"/v1/jobs/{job}")

    def metrics(
        self, job: str, names: Iterable[str] = (), *, after_step: int | None = None, max_points: int | None = None
    ) -> dict[str, Series]:
        """Give `{name: [[step, value], …]}`."""
        path = f"/v1/jobs/{job}/metrics"
        return self._connection.get(path, name=[*names] or None, after_step=after_step, max_points=max_points)

    def checkpoints(self, job: str) -> Page[Checkpoint]:
        """Give the checkpoints that are kept."""
        return self._connection.get(f"/v1/jobs/{job}/checkpoints")

    def download(self, job: str, folder: str | Path, *, advance: Advance | None = None) -> Sequence[Path]:
        """Download what the run made besides a model, verified."""
        path = f"/v1/jobs/{job}/files"
        files: Sequence[File] = self._connection.get(path)["data"]
        target = Path(folder)
        return [fetch_file(self._connection, f"{path}/{file['name']}", file, target, advance=advance) for file in files]

    def logged(self, job: str, *, after: int = 0, limit: int = 100) -> Sequence[Event]:
        """Give the events after a number that exist now."""
        return self._connection.get(f"/v1/jobs/{job}/events", after=after, limit=limit)["data"]

    def events(self, job: str, *, after: int = 0) -> Iterator[Event]:
        """Give every event as it happens, to the last; goes on behind the last one seen when the connection breaks."""
        patience, number = Patience(self._connection), after
        while True:
            seen = number
            try:
                for event in self._streamed(job, number):
                    number = event["number"]
                    patience.renew()
                    yield event
                    if event["type"] == "done":
                        return
                if number == seen and self.get(job)["status"] in ENDED:
                    return
            except LOST as error:
                patience.wait(error)

    def _streamed(self, job: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._connection.stream(f"/v1/jobs/{job}/events", headers=headers) as response:
            yield from server_sent(response.iter_lines())


def server_sent(lines: Iterable[str]) -> Iterator[Any]:
    """Read the JSON data of server-sent events; comments and half an event at a broken end are left out.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield json.loads("\n".join(data))
            data = []
