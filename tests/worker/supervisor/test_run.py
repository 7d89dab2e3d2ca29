"""One attempt at a job, with a fake trainer that goes wrong on demand: every end leads to the right state."""

import signal
from pathlib import Path
from typing import Any

import pytest

import worker.supervisor.wire
from app.domain.jobs import Status
from app.store import tables
from app.store.session import transaction
from tests.factories import make_job, make_project
from tests.fakes import COMMAND, digest_after
from tests.waiting import until
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
    weights_of,
)
from worker.supervisor.host import Host
from worker.supervisor.slots import Gpu, Slots
from worker.supervisor.warm import Warm
from worker.supervisor.work import work

pytestmark = pytest.mark.worker


def test_a_job_runs_from_the_claim_to_its_model(host: Host) -> None:
    job_id = submit(host.engine, steps=10)
    assert work(host, "message", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt, job.lease_owner) == (Status.SUCCEEDED, 1, None)
    assert job.plan == {"threads": 1, "made_in_attempt": 1}
    assert job.result == {"steps": 10}
    assert job.progress is not None
    assert job.progress["step"] == 10
    assert job.best == {"metric": "train/loss", "value": 0.1, "step": 10}
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(10)
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 11))
    assert [row.name for row in rows_of(host.engine, tables.JobFile, job_id, tables.JobFile.name)] == ["table.json"]
    (attempt,) = attempts_of(host.engine, job_id)
    assert (attempt.source, attempt.outcome, attempt.fingerprint) == ("message", "succeeded", {"machine": "fake"})
    events = events_of(host.engine, job_id)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.code for event in events if event.type == "status"] == ["queued", "starting", "running", "succeeded"]
    assert events[-1].type == "done"
    checkpoint = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)[-1]
    assert host.blobs.exists(checkpoint.sha256)


def test_a_trainer_gets_no_credentials(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNEYARD_ADMIN_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, "secret")
    job_id = submit(host.engine, steps=1)
    host.warm = Warm(cache=tmp_path / "cache", command=COMMAND)  # started by who has them
    try:
        host.warm.refresh()
        assert host.warm.ready.wait(60)
        work(host, "poll", internal=False)
    finally:
        host.warm.close()
    (began,) = [event for event in events_of(host.engine, job_id) if event.code == "trainer.began"]
    assert "PATH" in began.data["environment"]
    assert not [name for name in began.data["environment"] if name.startswith(("TUNEYARD", "AWS", "PG"))]


def test_a_killed_trainer_is_a_system_failure_and_the_next_attempt_goes_on(host: Host) -> None:
    job_id = submit(host.engine, steps=12, checkpoint_every=5, kill_at=8)
    assert work(host, "message", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert (job.status, job.status_reason, job.losses) == (Status.QUEUED, "retrying", 1)
    assert job.not_before > 0
    (lost,) = attempts_of(host.engine, job_id)
    assert lost.error is not None
    assert (lost.error["code"], lost.error["class"]) == ("trainer_killed", "system")
    again(host, job_id)
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt, job.exact) == (Status.SUCCEEDED, 2, True)
    assert job.plan == {"threads": 1, "made_in_attempt": 1}  # the first attempt's plan is used again
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(12)
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 13))
    began = [event.data["step"] for event in events_of(host.engine, job_id) if event.code == "trainer.began"]
    assert began == [0, 5]


@pytest.mark.parametrize(
    ("fake", "code"),
    [
        ({"exit_at": 3}, "trainer_exited"),
        ({"kill_at": 3, "signal": int(signal.SIGSEGV)}, "trainer_crashed"),
        ({"kill_at": 3, "signal": int(signal.SIGABRT)}, "trainer_crashed"),
        ({"garbage_at": 3}, "protocol"),
        ({"hang_at": 3}, "no_progress"),
        ({"silent_end": True}, "trainer_exited"),
        ({"escape": True}, "protocol"),
    ],
)
def test_whatever_a_trainer_does_it_is_classed_and_tried_again(host: Host, fake: dict[str, Any], code: str) -> None:
    usual = host.settings
    if "hang_at" in fake:
        host.settings = usual.model_copy(update={"progress_seconds": 1.5})
    job_id = submit(host.engine, steps=6, **fake)
    assert work(host, "poll", internal=False) == 1
    job = job_of(host.engine, job_id)
    (attempt,) = attempts_of(host.engine, job_id)
    assert job.status == Status.QUEUED
    assert attempt.error is not None
    assert attempt.error["code"] == code
    host.settings = usual
    again(host, job_id)
    if "escape" not in fake:
        assert job_of(host.engine, job_id).status == Status.SUCCEEDED
        assert weights_of(host.engine, host.blobs, job_id) == digest_after(6)


def test_the_last_output_of_a_crash_is_kept(host: Host) -> None:
    job_id = submit(host.engine, exit_at=1)
    work(host, "poll", internal=False)
    (output,) = [event for event in events_of(host.engine, job_id) if event.code == "trainer.output"]
    assert "about to exit" in output.data["output"]


def test_a_failure_that_the_trainer_names_is_final_unless_it_is_the_systems(host: Host) -> None:
    failure = {"fault": "user", "code": "diverged", "message": "The loss is not finite at step 2."}
    job_id = submit(host.engine, fail_at=2, failure=failure)
    work(host, "poll", internal=False)
    job = job_of(host.engine, job_id)
    assert job.status == Status.FAILED
    assert job.error is not None
    assert (job.error["class"], job.error["code"]) == ("user", "diverged")
    assert events_of(host.engine, job_id)[-1].type == "done"


def test_three_losses_without_a_newer_checkpoint_end_the_job(host: Host) -> None:
    job_id = submit(host.engine, steps=12, kill_at=3, faulty_attempts=99)
    work(host, "poll", internal=False)
    again(host, job_id)
    again(host, job_id)
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.FAILED, 3)
    assert job.error is not None
    assert job.error["code"] == "trainer_killed"


def test_endless_output_is_cut(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.supervisor.wire, "LOG_BYTES", 1000)
    job_id = submit(host.engine, hold_at=2, output_bytes=100_000)
    with running(host, job_id):
        log = run_of(host, job_id)._scratch.log
        until(lambda: log.stat().st_size < 1000)
        set_job(host.engine, job_id, wanted="cancel")
    assert job_of(host.engine, job_id).status == Status.CANCELLED


def test_one_host_runs_its_queue_in_order_without_waiting_for_polls(host: Host) -> None:
    with transaction(host.engine) as session:
        project = make_project(session)
        spec = {"recipe": "image_classification", "params": {"fake": {"steps": 1}}}
        ids = [make_job(session, project, spec=spec, priority=priority).id for priority in (0, 0, 5)]
    assert work(host, "message", internal=False) == 3
    finished = [job_of(host.engine, job_id).started_at for job_id in ids]
    assert all(job_of(host.engine, job_id).status == Status.SUCCEEDED for job_id in ids)
    assert finished[2] < finished[0] < finished[1]  # type: ignore[operator]
    assert [attempts_of(host.engine, job_id)[0].source for job_id in ids] == ["poll", "poll", "message"]


def test_without_a_free_slot_nothing_is_claimed(host: Host) -> None:
    submit(host.engine)
    seat = host.slots.take(internal=False)
    assert work(host, "message", internal=False) == 0
    host.slots.give_back(seat)
    assert work(host, "message", internal=False) == 1


def test_an_internal_job_does_not_wait_behind_training(host: Host) -> None:
    training = submit(host.engine, hold_at=2)
    with running(host, training):
        internal = submit(host.engine, steps=1, columns={"recipe": "measure", "kind": "internal", "internal": True})
        assert work(host, "poll", internal=False) == 0  # the training slot is taken
        assert work(host, "message", internal=True) == 1
        assert job_of(host.engine, internal).status == Status.SUCCEEDED
        set_job(host.engine, training, wanted="cancel")


@pytest.mark.parametrize(
    ("device", "internal", "gpus"), [("auto", False, "3"), ("cuda", False, "3"), ("cpu", True, "")]
)
def test_a_measuring_job_sits_and_sees_what_the_measured_job_would(
    host: Host, device: str, internal: bool, gpus: str
) -> None:
    host.slots = Slots(1, (Gpu("3", "card", 2**30),))
    columns = {"recipe": "measure", "kind": "internal", "internal": True, "device": device}
    job_id = submit(host.engine, steps=1, columns=columns)
    assert work(host, "message", internal=not internal) == 0
    assert work(host, "poll", internal=internal) == 1
    assert job_of(host.engine, job_id).status == Status.SUCCEEDED
    (began,) = [event for event in events_of(host.engine, job_id) if event.code == "trainer.began"]
    assert began.data["visible"] == gpus


def test_heartbeats_keep_the_lease_of_a_silent_but_living_run(host: Host) -> None:
    job_id = submit(host.engine, hold_at=2)
    with running(host, job_id):
        lease = run_of(host, job_id)._lease
        ends, confirmed = set[float | None](), set[float]()

        def extended() -> bool:
            ends.add(job_of(host.engine, job_id).lease_expires_at)
            confirmed.add(lease.confirmed)
            return min(len(ends), len(confirmed)) > 5  # its last words were written with the first of them

        until(extended)
        set_job(host.engine, job_id, wanted="stop")
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.STOPPED, 1)
