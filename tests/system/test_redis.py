"""Redis only lowers latency: killed, emptied, frozen or never there, jobs are accepted at once and run."""

import os
import signal
import time

import pytest

from app.local.redis import find_redis
from tests.fakes import digest_after
from tests.system.stack import Stack
from tests.waiting import until

pytestmark = pytest.mark.system
# Whoever asked Redis would wait for its socket's five seconds at every POST; a machine that stalls does so at some.
QUICK_SECONDS = 3.0


def post_seconds(stack: Stack, dataset: str) -> tuple[str, float]:
    body = stack.body(dataset=dataset, steps=5)
    began = time.monotonic()
    answer = stack.client.post("/v1/jobs", json=body)
    assert answer.status_code == 201
    return answer.json()["id"], time.monotonic() - began


def test_a_killed_redis_disturbs_no_job_and_its_return_is_noticed(stack: Stack) -> None:
    job_id = stack.submit(steps=100_000, step_seconds=0.03)
    stack.until_step(job_id, 5)
    stack.stop_redis()
    stack.until_step(job_id, stack.last_step(job_id) + 1)
    stack.verb(job_id, "stop")
    job = stack.until_status(job_id, "stopped")
    assert len(stack.attempts(job_id)) == 1
    assert stack.weights(job_id) == digest_after(job["result"]["steps"]).encode()
    stack.start_redis()

    def by_message() -> bool:
        again = stack.submit(steps=1)
        stack.until_status(again, "succeeded")
        return stack.attempts(again)[0].source == "message"

    until(by_message, 120, "the worker never listened to Redis again")


def test_with_redis_gone_a_post_is_quick_and_the_job_runs_by_polling(stack: Stack) -> None:
    dataset, took = stack.dataset(), list[float]()
    stack.stop_redis()
    for _ in range(3):
        job_id, seconds = post_seconds(stack, dataset)
        took.append(seconds)
        stack.until_status(job_id, "succeeded")
        assert stack.attempts(job_id)[0].source == "poll"
        stack.assert_ended_once(job_id)
    assert min(took) < QUICK_SECONDS


def test_with_redis_frozen_a_post_is_quick_and_the_job_runs_by_polling(stack: Stack) -> None:
    dataset, took = stack.dataset(), list[float]()
    assert stack.redis is not None
    os.kill(stack.redis.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            job_id, seconds = post_seconds(stack, dataset)
            took.append(seconds)
            stack.until_status(job_id, "succeeded")
    finally:
        os.kill(stack.redis.pid, signal.SIGCONT)
    assert min(took) < QUICK_SECONDS


def test_flushall_loses_nothing(stack: Stack) -> None:
    dataset = stack.dataset()
    blocker = stack.submit(dataset=dataset, hold_at=1)
    stack.until_step(blocker, 1)
    ids = [stack.submit(dataset=dataset, steps=3, seed=seed) for seed in range(10)]
    for _ in range(5):
        stack.flush_redis()
        time.sleep(0.1)
    stack.verb(blocker, "stop")
    for seed, job_id in enumerate(ids):
        stack.until_status(job_id, "succeeded")
        assert stack.weights(job_id) == digest_after(3, seed).encode()
        assert len(stack.attempts(job_id)) == 1
    stack.until_status(blocker, "stopped")


def test_a_hint_that_is_repeated_and_reordered_starts_nothing_twice(stack: Stack) -> None:
    from app.broker import Publisher
    from app.settings import Settings

    stack.ensure(workers=2)
    dataset = stack.dataset()
    publisher = Publisher(Settings(redis_url=stack.config.url))  # pyright: ignore[reportCallIssue]
    ids = [stack.submit(dataset=dataset, steps=2, seed=seed) for seed in range(10)]
    for job_id in ids[::-1] * 5:
        publisher.wake(job_id, internal=False)
    for job_id in ids:
        stack.until_status(job_id, "succeeded")
    publisher.close()
    assert [len(stack.attempts(job_id)) for job_id in ids] == [1] * len(ids)


def test_there_is_a_redis_to_test_with() -> None:
    assert find_redis() is not None
