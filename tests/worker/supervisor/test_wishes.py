"""What a user or a leaving host asks of a run: cancel, pause, stop, drain."""

import time

import pytest

from app.domain.jobs import Status
from app.store import tables
from tests.fakes import digest_after
from tests.waiting import dead
from tests.worker.supervisor.hosting import again, job_of, rows_of, running, set_job, submit, trainer_of, weights_of
from worker.supervisor.host import Host
from worker.supervisor.work import work

pytestmark = pytest.mark.worker


def test_a_cancel_ends_trainer_and_job(host: Host) -> None:
    job_id = submit(host.engine, hold_at=2)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        set_job(host.engine, job_id, wanted="cancel")
        host.runs[job_id].poke()
    assert job_of(host.engine, job_id).status == Status.CANCELLED
    assert dead(trainer)
    assert job_of(host.engine, job_id).model_id is None


def test_a_cancel_is_heard_without_a_poke_and_kills_who_does_not_listen(host: Host) -> None:
    job_id = submit(host.engine, hold_at=2, deaf=True)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        set_job(host.engine, job_id, wanted="cancel")
        began = time.monotonic()
    assert time.monotonic() - began < 60  # heartbeat and grace make 3.5 s, and by itself it ends after two minutes
    assert job_of(host.engine, job_id).status == Status.CANCELLED
    assert dead(trainer)


def test_pause_and_resume_lead_to_the_same_weights(host: Host) -> None:
    job_id = submit(host.engine, steps=60, checkpoint_every=1000, hold_at=3)
    with running(host, job_id):
        set_job(host.engine, job_id, wanted="pause")
    job = job_of(host.engine, job_id)
    assert (job.status, job.losses) == (Status.PAUSED, 0)
    (checkpoint,) = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)
    assert checkpoint.step == 3
    set_job(host.engine, job_id, wanted="run", status="queued")
    again(host, job_id)
    assert job_of(host.engine, job_id).status == Status.SUCCEEDED
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(60)


def test_a_stop_keeps_the_model(host: Host) -> None:
    job_id = submit(host.engine, hold_at=3)
    with running(host, job_id):
        set_job(host.engine, job_id, wanted="stop")
    job = job_of(host.engine, job_id)
    assert (job.status, job.result) == (Status.STOPPED, {"steps": 3})
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(3)


def test_a_drain_hands_the_job_back_with_a_checkpoint(host: Host) -> None:
    job_id = submit(host.engine, steps=60, checkpoint_every=1000, hold_at=3)
    with running(host, job_id):
        host.drain()
    job = job_of(host.engine, job_id)
    assert (job.status, job.status_reason, job.losses, job.lease_owner) == (Status.QUEUED, "drained", 0, None)
    (checkpoint,) = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)
    assert checkpoint.step == 3
    assert work(host, "poll", internal=False) == 0  # a draining host takes nothing
    host.draining.clear()
    host.drain_at = float("inf")
    again(host, job_id)
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(60)


def test_a_drain_does_not_wait_for_who_does_not_listen(host: Host) -> None:
    host.settings = host.settings.model_copy(update={"drain_seconds": 1.0})
    job_id = submit(host.engine, hold_at=2, deaf=True)
    with running(host, job_id):
        began = time.monotonic()
        host.drain()
    assert time.monotonic() - began < 60  # by itself it ends after two minutes
    job = job_of(host.engine, job_id)
    assert (job.status, job.status_reason, job.losses) == (Status.QUEUED, "drained", 0)
