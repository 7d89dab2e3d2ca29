"""Random kills over many jobs: every job ends exactly once, with the weights of an uninterrupted run."""

import contextlib
import os
import random
import signal
import time

import psutil
import pytest

from tests.fakes import digest_after
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.long]

SEED = int(os.environ.get("TUNEYARD_CHAOS_SEED", "1"))
SECONDS = float(os.environ.get("TUNEYARD_CHAOS_SECONDS", "120"))
JOBS = 24
STEPS = 200
STRIKES = ("worker", "worker", "trainer", "trainer", "zygote", "api", "redis", "flush", "freeze", "term")


def strike(stack: Stack, chance: random.Random) -> str:
    """Do one cruel thing to one process, and give its name."""
    what = chance.choice(
        ["worker", "worker", "trainer", "trainer", "zygote", "api", "redis", "flush", "freeze", "term"]
    )
    worker = chance.choice(stack.workers)
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
        match what:
            case "worker":
                stack.stop_worker(worker, signal.SIGKILL)
            case "term":
                stack.stop_worker(worker, signal.SIGTERM)
            case "trainer":
                os.kill(chance.choice(worker.trainers()), signal.SIGKILL)
            case "zygote":
                chance.choice(psutil.Process(worker.pid).children()).kill()
            case "api":
                assert stack.api is not None
                stack.api.kill()
                stack.api.wait()
            case "redis":
                stack.stop_redis()
            case "flush":
                stack.flush_redis()
            case "freeze":
                stack.freeze([worker.pid])
                time.sleep(chance.uniform(1, 16))
                os.kill(worker.pid, signal.SIGCONT)
    return what


def test_whatever_is_killed_every_job_ends_once_with_the_right_weights(stack: Stack) -> None:
    chance = random.Random(SEED)
    stack.ensure(workers=2)
    dataset = stack.dataset()
    ids = [
        stack.submit(dataset=dataset, seed=seed, steps=STEPS, step_seconds=0.02, checkpoint_every=10)
        for seed in range(JOBS)
    ]
    done: list[str] = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        time.sleep(chance.uniform(1.0, 5.0))
        done.append(strike(stack, chance))
        stack.ensure(workers=2)
    for seed, job_id in enumerate(ids):
        stack.until_status(job_id, "succeeded", seconds=300)
        assert stack.weights(job_id) == digest_after(STEPS, seed).encode()
        stack.assert_ended_once(job_id)
    attempts = sum(len(stack.attempts(job_id)) for job_id in ids)
    print(f"seed {SEED}: {len(done)} strikes, {attempts} attempts at {JOBS} jobs, all ended once")
    assert len(done) > 5
