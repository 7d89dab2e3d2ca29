"""SIGTERM: a checkpoint, the job back in the queue, and an end in time; another worker goes on with the same bits."""

import signal
import time

import pytest

from tests.fakes import digest_after
from tests.system.stack import Stack
from tests.waiting import dead, until

pytestmark = pytest.mark.system


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_drained_worker_hands_its_job_on(stack: Stack, number: signal.Signals) -> None:
    job_id = stack.submit(steps=150, checkpoint_every=10_000, hold_at=30)
    stack.until_step(job_id, 30)
    worker = stack.workers[0]
    family = worker.family()
    began = time.monotonic()
    stack.stop_worker(worker, number)
    assert time.monotonic() - began < 60  # and not after the whole time that a drain may take
    until(lambda: all(dead(pid) for pid in family))
    assert stack.job(job_id)["status"] == "queued"
    (checkpoint,) = stack.client.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    stack.ensure()
    stack.until_status(job_id, "succeeded")
    assert stack.weights(job_id) == digest_after(150).encode()
    steps = [event.data["step"] for event in stack.events(job_id) if event.code == "trainer.began"]
    assert steps == [0, checkpoint["step"]] == [0, 30]  # not one step was done twice
    assert [attempt.outcome for attempt in stack.attempts(job_id)] == ["drained", "succeeded"]
    stack.assert_ended_once(job_id)


def test_a_drain_ends_in_time_when_the_trainer_does_not_listen(stack: Stack) -> None:
    stack.stop_worker(stack.workers[0])
    worker = stack.start_worker(DRAIN_SECONDS="2")
    job_id = stack.submit(hold_at=5, steps=6, deaf=True)
    stack.until_step(job_id, 5)
    began = time.monotonic()
    assert stack.stop_worker(worker, signal.SIGTERM) == 0
    assert time.monotonic() - began < 60  # by itself the trainer ends after two minutes
    assert stack.job(job_id)["status"] == "queued"
    stack.verb(job_id, "cancel")


def test_a_worker_that_never_saw_redis_works_and_ends_at_once(stack: Stack) -> None:
    stack.stop_worker(stack.workers[0])
    stack.stop_redis()
    worker = stack.start_worker()
    job_id = stack.submit(steps=5)
    stack.until_status(job_id, "succeeded")
    assert stack.attempts(job_id)[0].source == "poll"
    began = time.monotonic()
    assert stack.stop_worker(worker, signal.SIGTERM) == 0
    assert time.monotonic() - began < 60  # and not after the whole time that a drain may take


def test_of_two_workers_the_other_takes_a_drained_job_at_once(stack: Stack) -> None:
    stack.ensure(workers=2)
    job_id = stack.submit(steps=200, checkpoint_every=10_000, hold_at=10)
    stack.until_step(job_id, 10)
    (holder,) = [worker for worker in stack.workers if worker.trainers()]
    stack.stop_worker(holder, signal.SIGTERM)
    stack.until_status(job_id, "succeeded")
    assert [attempt.outcome for attempt in stack.attempts(job_id)] == ["drained", "succeeded"]  # no lease ran out
    assert stack.weights(job_id) == digest_after(200).encode()
