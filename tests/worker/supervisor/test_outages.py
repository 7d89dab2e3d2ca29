"""What fails around a run: the lease, the database, the disk, a stored checkpoint, the supervisor itself."""

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.exc import OperationalError

import worker.supervisor.lease
from app.domain.jobs import Status
from app.store import tables
from app.store.blobs import Blobs
from app.store.session import transaction
from tests.fakes import digest_after
from tests.waiting import dead, until
from tests.worker.supervisor.hosting import (
    again,
    attempts_of,
    events_of,
    job_of,
    rows_of,
    run_of,
    running,
    set_job,
    submit,
    trainer_of,
    weights_of,
)
from worker.supervisor.host import Host
from worker.supervisor.work import work

pytestmark = pytest.mark.worker


def test_nothing_is_written_once_another_attempt_holds_the_job(host: Host) -> None:
    job_id = submit(host.engine, hold_at=2)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        with transaction(host.engine) as session:  # as a sweep and another worker's claim do
            session.execute(
                update(tables.Attempt).where(tables.Attempt.job_id == job_id).values(closed_at=1.0, outcome="lost")
            )
            session.execute(
                update(tables.Job).where(tables.Job.id == job_id).values(attempt=2, lease_owner="wrk_other")
            )
            written = session.get_one(tables.Job, job_id).last_event
    job = job_of(host.engine, job_id)
    assert dead(trainer)
    assert (job.status, job.attempt, job.lease_owner) == (Status.RUNNING, 2, "wrk_other")
    assert job.last_event == written


class Outage:
    """A database that can be switched off for the lease's writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = threading.Event()
        self.refused = 0
        self._transaction = worker.supervisor.lease.transaction
        monkeypatch.setattr(worker.supervisor.lease, "transaction", self)

    @contextlib.contextmanager
    def __call__(self, engine: Engine, *, read_only: bool = False) -> Iterator[Any]:
        if self.on.is_set():
            self.refused += 1
            raise OperationalError("select 1", {}, Exception("server closed the connection unexpectedly"))
        with self._transaction(engine, read_only=read_only) as session:
            yield session


def test_a_short_outage_of_the_database_is_sat_out(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage(monkeypatch)
    job_id = submit(host.engine, steps=10_000, step_seconds=0.02, checkpoint_every=10)
    with running(host, job_id):
        outage.on.set()
        until(lambda: outage.refused >= 3)
        outage.on.clear()
        set_job(host.engine, job_id, wanted="stop")
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.STOPPED, 1)
    assert job.result is not None
    steps = job.result["steps"]
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(steps)
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, steps + 1))


def test_a_long_outage_kills_the_trainer_before_the_lease_ends(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage(monkeypatch)
    host.settings = host.settings.model_copy(update={"lease_seconds": 100.0})
    job_id = submit(host.engine, hold_at=2, deaf=True)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        outage.on.set()
        until(lambda: outage.refused)
        began = time.monotonic()
        run_of(host, job_id)._lease.confirmed -= host.settings.fence_seconds - 2  # so long it has been away
        assert not dead(trainer)
        until(lambda: dead(trainer))
        assert time.monotonic() - began < 60
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt, job.lease_owner) == (Status.RUNNING, 1, "wrk_test")  # left to the lease


def test_a_checkpoint_that_newer_ones_replaced_before_it_was_stored_is_left_out(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk or database makes the supervisor late, and the trainer keeps its last two files alone."""
    store, late = Blobs.put_file, iter([True])

    def slow(blobs: Blobs, engine: Engine, path: Path) -> Any:
        if next(late, False):
            path.unlink()
            raise FileNotFoundError(path)
        return store(blobs, engine, path)

    monkeypatch.setattr(Blobs, "put_file", slow)
    job_id = submit(host.engine, steps=20, checkpoint_every=5)
    again(host, job_id)
    assert job_of(host.engine, job_id).status == "succeeded"
    (attempt,) = attempts_of(host.engine, job_id)
    assert attempt.error is None
    steps = [row.step for row in rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)]
    assert steps == [10, 15]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(host: Host) -> None:
    job_id = submit(host.engine, steps=20, checkpoint_every=5, kill_at=17)
    work(host, "poll", internal=False)
    checkpoints = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 15]
    path = host.blobs.path(checkpoints[-1].sha256)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"bits that rotted")
    again(host, job_id)
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(20)
    events = events_of(host.engine, job_id)
    assert [event.data["step"] for event in events if event.code == "trainer.began"] == [0, 10]
    assert [event.message for event in events if event.code == "checkpoint.damaged"] == [
        "The checkpoint of step 15 is damaged; the one before it is used."
    ]
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 21))


def test_a_full_disk_is_a_resource_failure(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host.blobs, "put_file", full)
    job_id = submit(host.engine, steps=10)
    work(host, "poll", internal=False)
    job = job_of(host.engine, job_id)
    assert job.status == Status.FAILED
    assert job.error is not None
    assert (job.error["class"], job.error["code"]) == ("resource", "disk_full")


def test_a_broken_supervisor_gives_the_job_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(host.blobs, "put_file", broken)
    job_id = submit(host.engine, steps=10)
    work(host, "poll", internal=False)
    job = job_of(host.engine, job_id)
    (attempt,) = attempts_of(host.engine, job_id)
    assert job.status == Status.QUEUED
    assert attempt.error is not None
    assert attempt.error["code"] == "supervisor"
