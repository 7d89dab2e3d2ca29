"""The engine as routes see it: a transaction that is followed by its wake-ups."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.store.session import transaction

Result = TypeVar("Result")


class Publisher(Protocol):
    """Sends hints to the workers; never blocks and never fails."""

    def wake(self, job_id: str, *, internal: bool) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Database:
    """One request or one step of it is one transaction; whoever has to be woken is woken after the commit."""

    engine: Engine
    publisher: Publisher

    @contextmanager
    def session(self, *, read_only: bool = False) -> Iterator[Session]:
        """Open a transaction that commits at the end of the block, and then send the wake-ups that it noted."""
        with transaction(self.engine, read_only=read_only) as session:
            yield session
        for job_id, internal in session.info.get("wake", ()):
            self.publisher.wake(job_id, internal=internal)

    async def run(self, work: Callable[[Session], Result], *, read_only: bool = False) -> Result:
        """Do one short transaction from an `async` route, which holds neither a session nor a thread while it waits."""

        def call() -> Result:
            with self.session(read_only=read_only) as session:
                return work(session)

        return await run_in_threadpool(call)
