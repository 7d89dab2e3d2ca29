"""The real trainer in real processes: kill -9 changes nothing in the weights, not one bit."""

import hashlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from app.store import tables
from tests.system.stack import REAL, Stack
from tests.waiting import until

pytestmark = pytest.mark.system


@pytest.fixture
def real(processes: Stack) -> Iterator[Stack]:
    """Give the stack with one worker that really trains, and leave none of these to the tests of the fake one."""
    processes.forget_jobs()
    processes.ensure(workers=0)
    processes.start_worker(REAL, THREADS="1")
    yield processes
    processes.ensure(workers=0)


def digits(stack: Stack) -> str:
    """Have scikit-learn's digits ingested once, by an internal job."""
    for row in stack.client.get("/v1/datasets", params={"name": "digits"}).json()["data"]:
        if row["status"] == "ready":
            return row["id"]
    answer = stack.client.post("/v1/datasets", json={"name": "digits", "builtin": "digits"})
    assert answer.status_code == 202, answer.text
    identity = answer.json()["id"]

    def status() -> str:
        return stack.client.get(f"/v1/datasets/{identity}").json()["status"]

    until(lambda: status() != "processing", 120)
    assert status() == "ready"
    return identity


def post(stack: Stack, **training: Any) -> str:
    body = {
        "recipe": "image_classification", "dataset": digits(stack),
        "model": {"architecture": "small_cnn", "width": 0.25},
        "training": {"epochs": 4, "batch_size": 128, "checkpoint_every": 3, "seed": 7} | training,
    }  # fmt: skip
    answer = stack.client.post("/v1/jobs", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def after_checkpoint(stack: Stack, job_id: str, count: int = 2) -> None:
    until(
        lambda: len([event for event in stack.events(job_id) if event.type == "checkpoint"]) >= count, 120,
        "there was no checkpoint",
    )  # fmt: skip


def attempts(stack: Stack, job_id: str) -> str:
    """What to look at when there were more of them than kills."""
    told = [f"{event.code}: {event.message}" for event in stack.events(job_id) if event.type != "metric"]
    rows = [f"attempt {row.attempt} {row.outcome} {row.error}" for row in stack.attempts(job_id)]
    return "\n".join([*rows, *told])


def digest(stack: Stack, job_id: str) -> str:
    return hashlib.sha256(stack.weights(job_id)).hexdigest()


def test_killed_in_the_middle_a_job_ends_with_the_bits_of_one_that_was_not(real: Stack) -> None:
    reference = post(real)
    real.until_status(reference, "succeeded", seconds=240)
    expected = digest(real, reference)
    assert len(real.attempts(reference)) == 1, attempts(real, reference)

    worker_killed = post(real)
    after_checkpoint(real, worker_killed)
    real.stop_worker(real.workers[0], signal.SIGKILL)
    real.start_worker(REAL, THREADS="1")
    job = real.until_status(worker_killed, "succeeded", seconds=240)
    assert job["attempt"] == 2, attempts(real, job["id"])
    assert job["exact"] is True
    assert digest(real, worker_killed) == expected
    real.assert_ended_once(worker_killed)

    trainer_killed = post(real)
    after_checkpoint(real, trainer_killed)
    (trainer,) = real.workers[0].trainers()
    os.kill(trainer, signal.SIGKILL)
    job = real.until_status(trainer_killed, "succeeded", seconds=240)
    assert job["attempt"] == 2, attempts(real, job["id"])
    assert digest(real, trainer_killed) == expected

    def curve(job_id: str) -> list[tuple[str, int, float | None]]:
        rows = real.rows(tables.Metric, job_id, tables.Metric.step)
        return sorted((row.name, row.step, row.value) for row in rows if row.name == "train/loss")

    assert curve(worker_killed) == curve(trainer_killed) == curve(reference)


def test_drained_and_paused_a_job_ends_with_the_bits_of_one_that_was_not(real: Stack) -> None:
    reference = post(real, seed=8)
    real.until_status(reference, "succeeded", seconds=240)

    drained = post(real, seed=8)
    after_checkpoint(real, drained, 1)
    real.stop_worker(real.workers[0], signal.SIGTERM, timeout=60)
    real.start_worker(REAL, THREADS="1")
    real.until_status(drained, "succeeded", seconds=240)
    assert digest(real, drained) == digest(real, reference)

    paused = post(real, seed=8)
    after_checkpoint(real, paused, 1)
    real.verb(paused, "pause")
    if real.until_status(paused, "paused", "succeeded", seconds=60)["status"] == "paused":
        real.verb(paused, "resume")
    real.until_status(paused, "succeeded", seconds=240)
    assert digest(real, paused) == digest(real, reference)
