"""What a trainer has said and no transaction has written yet, and when it is time to write it."""

import time
from typing import Any

from sqlalchemy.orm import Session

from app.store import attempts
from app.store.attempts import Held
from worker.report import Event
from worker.supervisor.lease import Lease

FLUSH_SECONDS = 2.0
FLUSH_BURST = 3.0  # the first lines of a run go out at once
FLUSH_ROWS = 20_000


class Outbox:
    """Numbers, events and progress of one run on their way to the database, at most once in FLUSH_SECONDS."""

    def __init__(self, held: Held, lease: Lease, since: float) -> None:
        self.rows: list[tuple[str, int, float | None]] = []
        self.events: list[Event] = []
        self.progress: dict[str, Any] | None = None
        self._held, self._lease = held, lease
        self._credit, self._counted = FLUSH_BURST, since

    def __bool__(self) -> bool:
        return bool(self.rows or self.events or self.progress)

    @property
    def patience(self) -> float | None:
        """How long the next word of the trainer may be waited for, in seconds; None is for ever."""
        return FLUSH_SECONDS if self else None

    def due(self) -> bool:
        """Say whether there is something to write and it is time."""
        if not self:
            return False
        now = time.monotonic()
        self._credit = min(FLUSH_BURST, self._credit + (now - self._counted) / FLUSH_SECONDS)
        self._counted = now
        return self._credit >= 1.0 or len(self.rows) > FLUSH_ROWS

    def forget_after(self, step: int) -> None:
        """Drop the numbers of steps that will be done again, after `step`."""
        self.rows = [row for row in self.rows if row[1] <= step]

    def flush(self) -> None:
        """Write it in a transaction of its own."""
        self._credit = max(self._credit - 1.0, 0.0)
        if self:
            self._lease.write(self.write)
            self.clear()

    def write(self, session: Session) -> None:
        """Write it in a transaction that may be tried again; `clear` when that is through."""
        if self.progress is not None:
            self._lease.progress = self.progress
        self._lease.beat(session)
        for event in self.events:
            attempts.write_event(
                session, self._held, code=event.code, message=event.message, level=event.level, data=event.data
            )
        if self.rows:
            attempts.write_metrics(session, self._held, self.rows)

    def clear(self) -> None:
        """Forget it: it is written, or cannot be."""
        self.rows, self.events, self.progress = [], [], None
