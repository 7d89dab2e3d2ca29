"""Several at once: processes that claim, a worker and a user that end a job in the same moment, sweeps."""

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, insert, select

from app.domain.errors import Conflict
from app.domain.jobs import Actor, Status, Wanted, on_request
from app.store import attempts, endings, events, life, sweeps, tables
from app.store.ids import new_id
from app.store.session import transaction
from tests.factories import make_job, make_project

pytestmark = pytest.mark.store

JOBS = 1000


def test_two_processes_and_a_thousand_jobs_are_a_thousand_claims(engine: Engine, database_url: str) -> None:
    with transaction(engine) as session:
        project = make_project(session)
        session.execute(
            insert(tables.Job),
            [
                {
                    "id": new_id("job"), "project_id": project.id, "name": "x", "recipe": "x", "recipe_version": "1",
                    "kind": "internal", "internal": True, "status": "queued", "spec": {}, "priority": 100,
                }
                for _ in range(JOBS)
            ],
        )  # fmt: skip
    script = Path(__file__).with_name("claim_jobs.py")
    command = [sys.executable, str(script), database_url, project.id]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two")]
    assert [worker.stdout.readline() for worker in workers if worker.stdout] == ["ready\n"] * 2
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    claimed = [line for worker in workers for line in worker.communicate(timeout=300)[0].splitlines()]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(claimed) == JOBS
    assert set(Counter(claimed).values()) == {1}
    assert {line.split()[1] for line in claimed} == {"1"}
    with transaction(engine) as session:
        of_ours = select(tables.Job.id).where(tables.Job.project_id == project.id)
        by_worker = select(tables.Attempt.worker, func.count()).where(tables.Attempt.job_id.in_(of_ours))
        shares = {worker: share for worker, share in session.execute(by_worker.group_by(tables.Attempt.worker))}  # noqa: C416
        assert sum(shares.values()) == JOBS
        assert set(shares) == {"one", "two"}, "both must have taken part"


def at_once(*steps: Callable[[], object]) -> list[object]:
    """Run steps in threads that start together; give what each returned or raised."""
    gate, answers = threading.Barrier(len(steps)), [None] * len(steps)

    def run(number: int) -> None:
        gate.wait()
        try:
            answers[number] = steps[number]()  # pyright: ignore[reportCallIssue, reportArgumentType]
        except Exception as error:
            answers[number] = error  # pyright: ignore[reportArgumentType, reportCallIssue]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return list(answers)


def held_job(engine: Engine) -> attempts.Held:
    with transaction(engine) as session:
        job = make_job(session, make_project(session))
        life.move(session, job, Status.STARTING, actor=Actor.CLAIM, lease=life.Lease("w", 60, "poll"))
        return attempts.Held(job.id, job.project_id, job.attempt, "w")


def log(engine: Engine, held: attempts.Held) -> list[tables.Event]:
    with transaction(engine, read_only=True) as session:
        return list(events.after(session, held.job_id, 0, 10_000))


@pytest.mark.parametrize("_round", range(8))
def test_a_cancel_and_an_end_at_once_agree_on_who_won(engine: Engine, _round: int) -> None:
    held = held_job(engine)

    def cancel() -> bool:
        with transaction(engine) as session:
            job = life.lock(session, held.job_id)
            assert job is not None
            try:
                move = on_request("cancel", Status(job.status), Wanted(job.wanted), has_checkpoint=False)
            except Conflict:
                return False
            assert move.wanted is not None
            job.wanted = move.wanted
            return True

    def finish() -> Status:
        with transaction(engine) as session:
            model = "mdl_x" if endings.may_publish(session, held) else None
            return endings.finish(session, held, Status.SUCCEEDED, model_id=model)

    accepted, status = at_once(cancel, finish)
    assert accepted in (True, False)
    assert status is (Status.CANCELLED if accepted else Status.SUCCEEDED)
    with transaction(engine, read_only=True) as session:
        job = session.get_one(tables.Job, held.job_id)
        assert (job.status, job.model_id) == (("cancelled", None) if accepted else ("succeeded", "mdl_x"))
    assert [event.type for event in log(engine, held)].count("done") == 1


@pytest.mark.parametrize("_round", range(4))
def test_an_end_and_a_takeover_at_once_leave_one_of_them(engine: Engine, _round: int) -> None:
    held = held_job(engine)
    with transaction(engine) as session:
        session.get_one(tables.Job, held.job_id).lease_expires_at = 1.0

    def finish() -> Status:
        with transaction(engine) as session:
            return endings.finish(session, held, Status.SUCCEEDED)

    def sweep() -> bool:
        with transaction(engine) as session:
            return (held.job_id, False) in sweeps.sweep(session, limit=10_000)

    ended, taken_over = at_once(finish, sweep)
    if taken_over:
        assert isinstance(ended, attempts.Fenced)
    else:
        assert ended is Status.SUCCEEDED
    with transaction(engine, read_only=True) as session:
        assert session.get_one(tables.Job, held.job_id).status == ("queued" if taken_over else "succeeded")


def test_events_of_many_writers_have_no_holes_and_no_doubles(engine: Engine) -> None:
    held = held_job(engine)

    def write() -> None:
        for _ in range(10):
            with transaction(engine) as session:
                attempts.write_event(session, held, code="x", message="x")

    answers = at_once(write, write, write, write)
    assert answers == [None] * 4
    numbers = [event.number for event in log(engine, held)]
    assert numbers == list(range(1, 43))


def test_the_last_two_children_may_end_at_once(engine: Engine) -> None:
    """Neither sees the other's end, so it is a sweep that lets the parent go on."""
    with transaction(engine) as session:
        project = make_project(session)
        parent = make_job(session, project, status="waiting")
        children = [
            make_job(session, project, parent_id=parent.id, child_key=key, status="queued") for key in ("a", "b")
        ]
    holders: list[attempts.Held] = []
    for child in children:
        with transaction(engine) as session:
            fresh = life.lock(session, child.id)
            assert fresh is not None
            life.move(session, fresh, Status.STARTING, actor=Actor.CLAIM, lease=life.Lease("w", 60, "poll"))
            holders.append(attempts.Held(child.id, project.id, 1, "w"))

    def finish(held: attempts.Held) -> Callable[[], Status]:
        def step() -> Status:
            with transaction(engine) as session:
                return endings.finish(session, held, Status.SUCCEEDED)

        return step

    assert at_once(*map(finish, holders)) == [Status.SUCCEEDED] * 2
    with transaction(engine) as session:
        sweeps.sweep(session, limit=10_000)
        assert session.get_one(tables.Job, parent.id).status == "queued"


def test_sweeps_in_parallel_do_each_thing_once(engine: Engine) -> None:
    holders = [held_job(engine) for _ in range(10)]
    with transaction(engine) as session:
        for held in holders:
            session.get_one(tables.Job, held.job_id).lease_expires_at = 1.0

    def sweep() -> list[tuple[str, bool]]:
        with transaction(engine) as session:
            return sweeps.sweep(session, limit=10_000)

    found = at_once(sweep, sweep, sweep)
    woken = Counter(job_id for one in found if isinstance(one, list) for job_id, _ in one)
    assert len([one for one in found if isinstance(one, list)]) == 3, found
    for held in holders:
        assert woken[held.job_id] == 1
        assert [event.code for event in log(engine, held)] == ["queued", "starting", "queued"]
