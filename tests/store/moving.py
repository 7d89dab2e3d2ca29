"""Jobs moved along a way of their life, each step by whoever may make it, and what is seen of them then."""

from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.domain.errors import Failure
from app.domain.jobs import Actor, Status
from app.store import events, life, tables
from app.store.session import transaction

LEASE = life.Lease("worker", 30, "message")
RUN = (Status.STARTING, Status.RUNNING)


def move(engine: Engine, job: tables.Job, *way: Status, failure: Failure | None = None) -> list[tuple[str, bool]]:
    """Move a job along a way, each step as whoever may make it; give the jobs to wake."""

    def go(session: Session, fresh: tables.Job) -> None:
        for after in way:
            actor = Actor.WORKER
            if after is Status.STARTING:
                actor = Actor.CLAIM
            elif fresh.status not in ("starting", "running"):
                actor = Actor.API
            lease = LEASE if after is Status.STARTING else None
            life.move(session, fresh, after, actor=actor, lease=lease, failure=failure)

    return act(engine, job, go)[1]


def act(
    engine: Engine, job: tables.Job, step: Callable[[Session, tables.Job], object] | None = None
) -> tuple[tables.Job, list[tuple[str, bool]]]:
    """Do one step on the locked job in one transaction; give the job and the jobs to wake."""
    with transaction(engine) as session:
        found = life.lock(session, job.id)
        assert found is not None
        if step is not None:
            step(session, found)
        return found, session.info.get("wake", [])


def look(engine: Engine, job: tables.Job) -> tables.Job:
    return act(engine, job)[0]


def log(engine: Engine, job: tables.Job) -> list[tables.Event]:
    with transaction(engine) as session:
        return list(events.after(session, job.id, 0, 1000))
