"""The lease on a held job: heartbeats, what the user wants, and writes that outlast a short outage. Torch-free."""

import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from app.domain.jobs import Wanted
from app.settings import Settings
from app.store import attempts
from app.store.attempts import Fenced, Held
from app.store.session import transaction

log = structlog.get_logger(__name__)

Result = TypeVar("Result")


class Lease:
    """Keeps a job held while its block runs.

    Every write of a run goes through `write`. When the database does not answer, it tries again until `fence_seconds`
    have passed since the last accepted heartbeat; from then on another worker may take the job, and nothing is written.
    """

    def __init__(
        self,
        engine: Engine,
        held: Held,
        settings: Settings,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_wake: Callable[[str, bool], None] = lambda _job, _internal: None,
        claimed: float | None = None,
    ) -> None:
        """`claimed` is the monotonic time just before the claim, from which the lease runs."""
        self.held = held
        self.wanted = Wanted.RUN
        self.progress: dict[str, Any] | None = None
        self.lost = False
        self.confirmed = time.monotonic() if claimed is None else claimed
        self._engine, self._settings = engine, settings
        self._on_change, self._on_wake = on_change, on_wake
        self._poked, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{held.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._poked.set()
        self._thread.join(self._settings.fence_seconds)

    def poke(self) -> None:
        """Ask the database at once what is wanted."""
        self._poked.set()

    def check(self) -> None:
        """Raise Fenced when the job is no longer ours."""
        if self.lost or time.monotonic() - self.confirmed > self._settings.fence_seconds:
            self._lose()
            raise Fenced(f"attempt {self.held.attempt} of {self.held.job_id} lost its lease")

    def write(self, step: Callable[[Session], Result]) -> Result:
        """Run `step` in one transaction; try again while the database is away.

        Raises:
            Fenced: the job belongs to somebody else, or the database was away too long to know.
        """
        pause, told = 0.1, False
        while True:
            self.check()
            try:
                with transaction(self._engine) as session:
                    result = step(session)
            except Fenced:
                self._lose()
                raise
            except (OperationalError, InterfaceError, PoolTimeout, DBAPIError) as error:
                if not is_outage(error):
                    raise
                if not told:
                    log.warning(
                        "the database does not answer", job=self.held.job_id, error=str(error.__cause__ or error)
                    )
                told = True
                time.sleep(pause)
                pause = min(pause * 2, 1.0)
            else:
                self._committed(session.info)
                return result

    def beat(self, session: Session) -> Wanted:
        """Extend the lease inside a transaction of `write`, and hear what is wanted."""
        asked = time.monotonic()
        progress, self.progress = self.progress, None
        wanted = attempts.heartbeat(session, self.held, lease_seconds=self._settings.lease_seconds, progress=progress)
        session.info["beat"] = (asked, wanted)
        return wanted

    def _committed(self, info: dict[Any, Any]) -> None:
        if "beat" in info:
            asked, wanted = info["beat"]
            self.confirmed = max(self.confirmed, asked)
            if wanted is not self.wanted:
                self.wanted = wanted
                self._on_change()
        for job_id, internal in info.get("wake", ()):
            self._on_wake(job_id, internal)

    def _beat(self) -> None:
        every = self._settings.heartbeat_seconds
        while not self._closed.is_set():
            # A write of the run beats too, so an idle heartbeat is only due when nothing was written for a while.
            due = self.confirmed + every * random.uniform(0.8, 1.0) - time.monotonic()  # noqa: S311
            if not self._poked.wait(max(due, 0.0)) and time.monotonic() - self.confirmed < every * 0.8:
                continue
            self._poked.clear()
            if self._closed.is_set():
                return
            try:
                self.write(self.beat)
            except Fenced:
                return
            except Exception:
                log.exception("heartbeat failed", job=self.held.job_id)
                time.sleep(min(1.0, every))

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            self.confirmed = float("-inf")  # the wire's fence sees it at its next look
            self._on_change()


def is_outage(error: Exception) -> bool:
    """Say whether trying the same again may help: a lost connection or a lock, but no broken statement."""
    if isinstance(error, (InterfaceError, PoolTimeout)):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if not isinstance(error, OperationalError):
        return False
    return "no such" not in str(error.orig) and "syntax" not in str(error.orig)
