"""What happens to a job on a worker of these tests: given, run, looked at."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from sqlalchemy import Engine, select, update

from app.store import tables
from app.store.blobs import Blobs
from app.store.session import transaction
from tests.factories import make_job, make_project
from tests.waiting import until
from worker.supervisor.host import Host
from worker.supervisor.run import Run
from worker.supervisor.work import work


def submit(engine: Engine, *, columns: dict[str, Any] | None = None, **fake: Any) -> str:
    """Insert a job whose fake trainer behaves as told."""
    with transaction(engine) as session:
        spec = {"recipe": "image_classification", "params": {"fake": fake}}
        return make_job(session, make_project(session), spec=spec, **(columns or {})).id


def job_of(engine: Engine, job_id: str) -> tables.Job:
    """Read a job."""
    with transaction(engine, read_only=True) as session:
        return session.get_one(tables.Job, job_id)


def rows_of(engine: Engine, table: Any, job_id: str, order: Any) -> list[Any]:
    """Read the rows of a table that belong to a job."""
    with transaction(engine, read_only=True) as session:
        return list(session.scalars(select(table).where(table.job_id == job_id).order_by(order)))


def events_of(engine: Engine, job_id: str) -> list[tables.Event]:
    """Read its log."""
    return rows_of(engine, tables.Event, job_id, tables.Event.number)


def attempts_of(engine: Engine, job_id: str) -> list[tables.Attempt]:
    """Read its attempts."""
    return rows_of(engine, tables.Attempt, job_id, tables.Attempt.attempt)


def set_job(engine: Engine, job_id: str, **values: Any) -> None:
    """Write columns of a job, as somebody else would."""
    with transaction(engine) as session:
        session.execute(update(tables.Job).where(tables.Job.id == job_id).values(**values))


def again(host: Host, job_id: str) -> None:
    """Run the next attempt now, whatever the back-off."""
    set_job(host.engine, job_id, not_before=0.0)
    assert work(host, "poll", internal=False) == 1


def weights_of(engine: Engine, blobs: Blobs, job_id: str) -> str:
    """Read the weights that a job published."""
    model = job_of(engine, job_id).model_id
    with transaction(engine, read_only=True) as session:
        row = session.get_one(tables.ModelFile, (model, "model.safetensors"))
    return b"".join(blobs.open(row.sha256)).decode()


@contextlib.contextmanager
def running(host: Host, job_id: str, step: int = 2) -> Iterator["Future[int]"]:
    """Run a job beside the test, from the moment on when its trainer has reported `step`."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, host, "message", internal=False)
        until(lambda: any(
            "train/loss" in event.data.get("metrics", {}) and event.data["metrics"]["train/loss"][0] >= step
            for event in events_of(host.engine, job_id)
        ))  # fmt: skip
        yield future
        future.result(120)


def run_of(host: Host, job_id: str) -> Run:
    """Give the run of a job that is under way."""
    return cast(Run, host.runs[job_id])


def trainer_of(host: Host, job_id: str) -> int:
    """Give the process id of the trainer that runs a job now."""
    wire = run_of(host, job_id)._wire
    assert wire is not None
    return wire._trainer.pid
