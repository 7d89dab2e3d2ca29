"""What the database itself refuses, whatever the code does."""

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.domain.jobs import Status
from app.store import events, tables
from app.store.session import transaction
from tests.store.moving import RUN, act, move

pytestmark = pytest.mark.store


def refused(engine: Engine, job: tables.Job, sql: str) -> None:
    with pytest.raises(IntegrityError), transaction(engine) as session:
        session.execute(text(sql), {"job": job.id})


def test_a_held_job_without_a_lease(engine: Engine, job: tables.Job) -> None:
    refused(engine, job, "update jobs set status = 'running' where id = :job")
    move(engine, job, *RUN)
    refused(engine, job, "update jobs set lease_expires_at = null where id = :job")


def test_a_second_open_attempt(engine: Engine, job: tables.Job) -> None:
    move(engine, job, *RUN)
    refused(
        engine, job,
        "insert into attempts (job_id, attempt, worker, source, opened_at) values (:job, 2, 'w', 'poll', 1)",
    )  # fmt: skip


def test_a_second_end(engine: Engine, job: tables.Job) -> None:
    move(engine, job, Status.CANCELLED)
    with pytest.raises(IntegrityError):
        act(
            engine,
            job,
            lambda session, fresh: events.append(session, fresh, type="done", code="again", message="again"),
        )


def test_the_same_number_twice(engine: Engine, job: tables.Job) -> None:
    def step(session: Session, fresh: tables.Job) -> None:
        fresh.last_event = 0
        session.flush()
        events.append(session, fresh, type="log", code="x", message="x")

    with pytest.raises(IntegrityError):
        act(engine, job, step)
