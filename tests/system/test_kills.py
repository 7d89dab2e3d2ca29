"""What kill -9 and SIGSTOP do, anywhere: the job ends once, with the weights of an uninterrupted run."""

import contextlib
import os
import signal

import psutil
import pytest

from app.store import tables
from tests.fakes import digest_after
from tests.system.stack import Stack
from tests.waiting import dead, until

pytestmark = pytest.mark.system


def test_a_killed_worker_leaves_no_orphan_and_another_goes_on(stack: Stack) -> None:
    job_id = stack.submit(steps=150, checkpoint_every=20, hold_at=45)
    stack.until_step(job_id, 45)
    worker = stack.workers[0]
    family = worker.family()
    assert len(family) == 3  # supervisor, zygote, trainer
    stack.stop_worker(worker)
    until(lambda: all(dead(pid) for pid in family))
    stack.ensure(workers=1)
    until(lambda: len(stack.attempts(job_id)) == 2, what="nobody took over when the lease had run out")
    stack.until_status(job_id, "succeeded")
    assert stack.weights(job_id) == digest_after(150).encode()
    stack.assert_ended_once(job_id)
    assert [attempt.outcome for attempt in stack.attempts(job_id)] == ["lost", "succeeded"]
    steps = [event.data["step"] for event in stack.events(job_id) if event.code == "trainer.began"]
    assert steps == [0, 40]  # at most one checkpoint's work was lost
    metrics = stack.rows(tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 151))


def test_of_two_workers_the_other_takes_over(stack: Stack) -> None:
    stack.ensure(workers=2)
    job_id = stack.submit(steps=150, checkpoint_every=20, hold_at=30)
    stack.until_step(job_id, 30)
    (holder,) = [worker for worker in stack.workers if worker.trainers()]
    stack.stop_worker(holder)
    stack.expire(job_id)
    stack.until_status(job_id, "succeeded")
    assert stack.weights(job_id) == digest_after(150).encode()
    stack.assert_ended_once(job_id)
    first, second = stack.attempts(job_id)
    assert first.worker != second.worker


def test_a_killed_trainer_is_tried_again_at_once_by_the_same_worker(stack: Stack) -> None:
    job_id = stack.submit(steps=150, checkpoint_every=20, hold_at=30)
    stack.until_step(job_id, 30)
    (trainer,) = stack.workers[0].trainers()
    os.kill(trainer, signal.SIGKILL)
    stack.until_status(job_id, "succeeded")
    assert stack.weights(job_id) == digest_after(150).encode()
    stack.assert_ended_once(job_id)
    first, second = stack.attempts(job_id)
    assert (first.outcome, first.worker) == ("failed", second.worker)
    assert first.error is not None
    assert first.error["code"] == "trainer_killed"
    assert first.closed_at is not None
    assert second.opened_at - first.closed_at < 60


def test_a_killed_zygote_is_replaced_and_the_job_goes_on(stack: Stack) -> None:
    job_id = stack.submit(steps=150, checkpoint_every=20, hold_at=30)
    stack.until_step(job_id, 30)
    (zygote,) = psutil.Process(stack.workers[0].pid).children()
    zygote.kill()
    stack.until_status(job_id, "succeeded")
    assert stack.weights(job_id) == digest_after(150).encode()
    stack.assert_ended_once(job_id)


def test_a_killed_api_disturbs_no_job(stack: Stack) -> None:
    job_id = stack.submit(steps=100_000, step_seconds=0.03)
    stack.until_step(job_id, 5)
    assert stack.api is not None
    stack.api.kill()
    stack.api.wait()
    stack.until_step(job_id, stack.last_step(job_id) + 1)
    stack.ensure()
    stack.verb(job_id, "stop")
    job = stack.until_status(job_id, "stopped")
    assert len(stack.attempts(job_id)) == 1
    assert stack.weights(job_id) == digest_after(job["result"]["steps"]).encode()
    stack.assert_ended_once(job_id, "stopped")


@pytest.mark.parametrize("whole_family", [False, True], ids=["supervisor", "supervisor and trainer"])
def test_a_stopped_supervisor_that_wakes_up_late_writes_nothing(stack: Stack, whole_family: bool) -> None:
    stack.ensure(workers=2)
    job_id = stack.submit(steps=100_000, step_seconds=0.03, checkpoint_every=20)
    stack.until_step(job_id, 30)
    (sleeper,) = [worker for worker in stack.workers if worker.trainers()]
    frozen = sleeper.family() if whole_family else [sleeper.pid]
    (trainer,) = sleeper.trainers()
    stack.freeze(frozen)
    try:
        if whole_family:
            stack.expire(job_id)  # and the sleeper will believe that its lease still runs
        until(lambda: len(stack.attempts(job_id)) == 2, what="nobody took over")
        if not whole_family:
            until(lambda: dead(trainer))  # it heard no tick for the length of the fence
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):  # a passing helper of the family may be gone
                os.kill(pid, signal.SIGCONT)
    until(lambda: dead(trainer), what="the stale trainer lives")
    until(lambda: not sleeper.trainers())
    stack.until_step(job_id, stack.last_step(job_id) + 1)  # the other goes on
    stack.verb(job_id, "stop")
    steps = stack.until_status(job_id, "stopped")["result"]["steps"]
    assert stack.weights(job_id) == digest_after(steps).encode()
    stack.assert_ended_once(job_id, "stopped")  # no event of the first attempt follows one of the second
    assert [attempt.outcome for attempt in stack.attempts(job_id)] == ["lost", "stopped"]
    metrics = stack.rows(tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, steps + 1))
    taken_over = min(row.step for row in metrics if row.attempt == 2)
    assert {row.attempt for row in metrics if row.step >= taken_over} == {2}
    again = stack.submit(steps=3)  # and the sleeper is of use again
    stack.until_status(again, "succeeded")


def test_a_job_that_kills_every_trainer_ends_and_the_others_run(stack: Stack) -> None:
    poison = stack.submit(steps=20, kill_at=3, faulty_attempts=99)
    healthy = [stack.submit(steps=10, seed=seed) for seed in range(3)]
    for seed, job_id in enumerate(healthy):
        stack.until_status(job_id, "succeeded")
        assert stack.weights(job_id) == digest_after(10, seed).encode()
    job = stack.until_status(poison, "failed")
    assert job["attempt"] == 3
    assert job["error"]["class"] == "system"
    stack.assert_ended_once(poison, "failed")
