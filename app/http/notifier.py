"""Waiting without holding anything: one notifier per process asks the database what changed, for all who wait.

A waiter holds neither a database session nor a pool thread. While there are waiters, one background task runs one query
per kind of object about every 150 ms, in a thread; without waiters it sleeps. New lines of a job's log are read and
rendered once, however many streams follow the job.
"""

import asyncio
import contextlib
import signal
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NamedTuple

import structlog
from sqlalchemy import Engine, literal, select

from app.domain.errors import TooManyRequests
from app.domain.jobs import TERMINAL
from app.store import events, tables
from app.store.session import transaction

Kind = Literal["job", "dataset", "model"]
_TABLES: dict[Kind, Any] = {"job": tables.Job, "dataset": tables.Dataset, "model": tables.Model}
Render = Callable[[tables.Event], bytes]

_TAIL = 512  # lines kept for streams that keep up; a slower one reads the table again
_PAGE = 200

log = structlog.get_logger(__name__)


class State(NamedTuple):
    """What a waiter can wait for: the status, and for a job the number of its last event."""

    status: str
    last_event: int = 0


class Line(NamedTuple):
    """One event, rendered."""

    number: int
    last: bool  # the log ends here
    data: bytes


@dataclass
class _Watched:
    """One object that somebody waits for."""

    watchers: int = 0
    state: State | None = None
    gone: bool = False
    render: Render | None = None
    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=_TAIL))
    read_up_to: int | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Notifier:
    """Wakes whoever waits in this process. Made in the lifespan, closed at its end."""

    def __init__(
        self, engine: Engine, *, streams_per_key: int, interval: float = 0.15, keep_alive_seconds: float = 15.0
    ) -> None:
        self._engine, self._interval = engine, interval
        self._streams_per_key, self._keep_alive_seconds = streams_per_key, keep_alive_seconds
        self._watched: dict[tuple[Kind, str], _Watched] = {}
        self._open: Counter[str] = Counter()
        self._any = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._closing = False

    async def start(self) -> None:
        """Begin to look; called once, on the event loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._look_for_ever(), name="notifier")
        self._end_on_signals()

    async def close(self) -> None:
        """End every stream and wait, then the task itself."""
        self._end_streams()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def open_streams(self) -> int:
        """How many streams and long polls are open now."""
        return self._open.total()

    def enter(self, key_id: str) -> Callable[[], None]:
        """Count one more stream or long poll of a key; the caller calls what it gets back exactly once, at the end.

        Raises:
            TooManyRequests: the key has as many open as it may.
        """
        if self._open[key_id] >= self._streams_per_key:
            raise TooManyRequests(
                f"This key already has {self._streams_per_key} open streams and long polls; close one first.",
                code="too_many_streams", retry_after=5,
            )  # fmt: skip
        self._open[key_id] += 1

        def leave() -> None:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]

        return leave

    async def change(
        self, kind: Kind, id: str, *, since: str, timeout: float, gone: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        """Wait until the status is no longer `since`, the object is gone, the time is up, or the server ends.

        `gone` says whether the caller has hung up; it is asked every second.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        with self._watch(kind, id) as watched:
            while not (self._closing or watched.gone or (watched.state and watched.state.status != since)):
                left = deadline - clock()
                if left <= 0 or (not await _wait(watched.changed, min(left, 1.0)) and gone and await gone()):
                    return

    async def lines(self, job_id: str, after: int, render: Render) -> AsyncIterator[bytes]:
        """Give a job's log as rendered bytes from line `after` + 1 on, keep-alives while it is quiet, until it ends."""
        with self._watch("job", job_id, render) as watched:
            number = after
            while not self._closing:
                changed = watched.changed
                known = watched.state.last_event if watched.state else None
                for line in await self._next(job_id, number, watched, render):
                    yield line.data
                    number = line.number
                    if line.last:
                        return
                if watched.gone or self._closing:
                    return
                behind = known is None or (watched.state is not None and watched.state.last_event > number)
                ended = watched.state is not None and watched.state.status in TERMINAL
                if ended and not behind:
                    return  # resumed after the last line
                if (known is None or not behind) and not await _wait(changed, self._keep_alive_seconds):
                    yield b": keep-alive\n\n"

    async def _next(self, job_id: str, number: int, watched: _Watched, render: Render) -> Sequence[Line]:
        if watched.lines and watched.lines[0].number <= number + 1 <= watched.lines[-1].number:
            return [line for line in watched.lines if line.number > number]
        if watched.state is not None and watched.state.last_event <= number:
            return ()
        return await asyncio.to_thread(self._read_lines, job_id, number, render)

    def _read_lines(self, job_id: str, number: int, render: Render) -> list[Line]:
        with transaction(self._engine, read_only=True) as session:
            return [_line(event, render) for event in events.after(session, job_id, number, _PAGE)]

    @contextlib.contextmanager
    def _watch(self, kind: Kind, id: str, render: Render | None = None) -> Iterator[_Watched]:
        watched = self._watched.setdefault((kind, id), _Watched())
        watched.watchers += 1
        watched.render = watched.render or render
        self._any.set()
        try:
            yield watched
        finally:
            watched.watchers -= 1
            if not watched.watchers:
                del self._watched[kind, id]
            if not self._watched:
                self._any.clear()

    async def _look_for_ever(self) -> None:
        while True:
            await self._any.wait()
            try:
                await self._look()
            except Exception:  # the database may be away for a while; waiters keep waiting until their time is up
                log.warning("notifier.failed", exc_info=True)
                await asyncio.sleep(1)
            await asyncio.sleep(self._interval)

    async def _look(self) -> None:
        asked = dict(self._watched)
        tails = {
            key[1]: watched.read_up_to for key, watched in asked.items() if key[0] == "job" and watched.render
        }  # fmt: skip
        states, new_events = await asyncio.to_thread(self._read, list(asked), tails)
        for key, watched in asked.items():
            state = states.get(key)
            fresh = new_events.get(key[1], ()) if key[0] == "job" else ()
            if watched.render:
                watched.lines.extend(_line(event, watched.render) for event in fresh)
                if state is not None:
                    watched.read_up_to = watched.lines[-1].number if watched.lines else state.last_event
            if state != watched.state or (state is None and not watched.gone):
                watched.state, watched.gone = state, state is None
                _wake(watched)

    def _read(
        self, keys: Sequence[tuple[Kind, str]], tails: dict[str, int | None]
    ) -> tuple[dict[tuple[Kind, str], State], dict[str, list[tables.Event]]]:
        """Ask for all at once; runs in a thread."""
        states: dict[tuple[Kind, str], State] = {}
        fresh: dict[str, list[tables.Event]] = {}
        with transaction(self._engine, read_only=True) as session:
            for kind, table in _TABLES.items():
                if ids := [key[1] for key in keys if key[0] == kind]:
                    columns = (table.id, table.status, table.last_event if table is tables.Job else literal(0))
                    rows = session.execute(select(*columns).where(table.id.in_(ids), table.deleted_at.is_(None)))
                    states |= {(kind, row[0]): State(row[1], row[2]) for row in rows}
            for job_id, read_up_to in tails.items():
                state = states.get(("job", job_id))
                if state is not None and read_up_to is not None and state.last_event > read_up_to:
                    fresh[job_id] = list(events.after(session, job_id, read_up_to, _TAIL))
        return states, fresh

    def _end_streams(self) -> None:
        self._closing = True
        for watched in self._watched.values():
            _wake(watched)

    def _end_on_signals(self) -> None:
        """End the streams as soon as the server is told to go: it waits for them before it ends the lifespan."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._end_streams)
        self._handlers[signal.Signals(number)](number, frame)


def _line(event: tables.Event, render: Render) -> Line:
    return Line(event.number, event.type == "done", render(event))


def _wake(watched: _Watched) -> None:
    changed, watched.changed = watched.changed, asyncio.Event()
    changed.set()


async def _wait(changed: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(changed.wait(), seconds)
    except TimeoutError:
        return False
    return True
