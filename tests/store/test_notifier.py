"""Waiting without holding anything: what wakes, what is asked of the database, and when it all ends."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import Engine
from sqlalchemy import event as sqlalchemy_event

from app.domain.errors import TooManyRequests
from app.domain.jobs import Actor, Status
from app.http.notifier import Notifier
from app.store import events, life, tables
from app.store.session import transaction
from tests import factories

pytestmark = pytest.mark.store
PROMPT_SECONDS = 30.0  # of a machine that stalls now and then; what is not prompt waits for a hundred


def run(engine: Engine, work: Callable[[Notifier], Awaitable[None]], *, streams_per_key: int = 3) -> None:
    async def main() -> None:
        notifier = Notifier(engine, streams_per_key=streams_per_key, interval=0.03, keep_alive_seconds=0.2)
        await notifier.start()
        try:
            await asyncio.wait_for(work(notifier), 200)
        finally:
            await notifier.close()

    asyncio.run(main())


@pytest.fixture
def job(engine: Engine) -> str:
    with transaction(engine) as session:
        return factories.make_job(session, factories.make_project(session)).id


def cancel(engine: Engine, job_id: str) -> None:
    with transaction(engine) as session:
        locked = life.lock(session, job_id)
        assert locked is not None
        life.move(session, locked, Status.CANCELLED, actor=Actor.API)


def say(engine: Engine, job_id: str, count: int = 1) -> None:
    with transaction(engine) as session:
        locked = life.lock(session, job_id)
        assert locked is not None
        for _ in range(count):
            events.append(session, locked, type="log", code="line", message="A line.")


def number(event: tables.Event) -> bytes:
    return str(event.number).encode()


def test_a_change_wakes_and_a_missing_one_times_out(engine: Engine, job: str) -> None:
    async def work(notifier: Notifier) -> None:
        started = time.monotonic()
        await notifier.change("job", job, since="queued", timeout=0.3)
        assert time.monotonic() - started > 0.25
        waiting = asyncio.create_task(notifier.change("job", job, since="queued", timeout=100))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(say, engine, job)
        await asyncio.sleep(0.2)
        assert not waiting.done()  # an event is no change of status
        await asyncio.to_thread(cancel, engine, job)
        started = time.monotonic()
        await waiting
        assert time.monotonic() - started < PROMPT_SECONDS
        await notifier.change("job", job, since="queued", timeout=100)  # it changed before anybody waited

    run(engine, work)


def test_what_is_gone_is_not_waited_for(engine: Engine) -> None:
    async def work(notifier: Notifier) -> None:
        started = time.monotonic()
        await notifier.change("job", "job_none", since="queued", timeout=100)
        assert time.monotonic() - started < PROMPT_SECONDS

    run(engine, work)


def test_a_caller_that_hung_up_is_not_waited_for(engine: Engine, job: str) -> None:
    async def work(notifier: Notifier) -> None:
        async def gone() -> bool:
            return True

        started = time.monotonic()
        await notifier.change("job", job, since="queued", timeout=100, gone=gone)
        assert time.monotonic() - started < PROMPT_SECONDS

    run(engine, work)


def test_a_dataset_and_a_model_are_waited_for_too(engine: Engine) -> None:
    with transaction(engine) as session:
        project = factories.make_project(session)
        dataset = factories.make_dataset(session, project, ready=False).id
        model = factories.make_model(session, project, status="processing").id

    def finish() -> None:
        with transaction(engine) as session:
            session.get_one(tables.Dataset, dataset).status = "ready"
            session.get_one(tables.Model, model).status = "failed"

    async def work(notifier: Notifier) -> None:
        waiting = [
            asyncio.create_task(notifier.change("dataset", dataset, since="processing", timeout=100)),
            asyncio.create_task(notifier.change("model", model, since="processing", timeout=100)),
        ]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in waiting)
        await asyncio.to_thread(finish)
        await asyncio.wait_for(asyncio.gather(*waiting), PROMPT_SECONDS)

    run(engine, work)


def test_the_database_is_left_alone_when_nobody_waits_and_asked_once_for_all(engine: Engine, job: str) -> None:
    asked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    async def work(notifier: Notifier) -> None:
        await asyncio.sleep(0.3)
        assert asked == []
        waiting = [asyncio.create_task(notifier.change("job", job, since="queued", timeout=100)) for _ in range(50)]
        while len(asked) < 3:
            await asyncio.sleep(0.01)
        assert len(asked) < 40  # one query per look, not one per waiter
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        while asked:  # a last look may still be under way, and then there is none
            asked.clear()
            await asyncio.sleep(0.3)

    sqlalchemy_event.listen(engine, "before_cursor_execute", note)
    try:
        run(engine, work)
    finally:
        sqlalchemy_event.remove(engine, "before_cursor_execute", note)


def test_every_line_is_rendered_once_for_all_who_keep_up(engine: Engine, job: str) -> None:
    rendered: list[int] = []

    def render(event: tables.Event) -> bytes:
        rendered.append(event.number)
        return number(event)

    seen: list[list[int]] = [[] for _ in range(30)]

    async def follow(notifier: Notifier, lines: list[int]) -> None:
        async for line in notifier.lines(job, 1, render):
            if not line.startswith(b":"):
                lines.append(int(line))

    async def work(notifier: Notifier) -> None:
        followers = [asyncio.create_task(follow(notifier, lines)) for lines in seen]
        while not (watched := notifier._watched.get(("job", job))) or watched.read_up_to is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        for count in range(1, 6):
            await asyncio.to_thread(say, engine, job, 3)
            while min(map(len, seen)) < 3 * count:  # all keep up
                await asyncio.sleep(0.01)
        await asyncio.to_thread(cancel, engine, job)
        await asyncio.gather(*followers)
        assert seen == [list(range(2, 19))] * 30
        assert sorted(set(rendered)) == list(range(2, 19))
        assert len(rendered) < 60  # 30 followers of 17 lines

    run(engine, work)


def test_a_slow_reader_misses_nothing(engine: Engine, job: str) -> None:
    async def work(notifier: Notifier) -> None:
        seen: list[int] = []
        async for line in notifier.lines(job, 0, number):
            if line.startswith(b":"):
                continue
            seen.append(int(line))
            if len(seen) == 1:
                await asyncio.sleep(0.2)
                for _ in range(4):  # far more than is kept for those who keep up
                    await asyncio.to_thread(say, engine, job, 300)
                    await asyncio.sleep(0.1)
                await asyncio.to_thread(cancel, engine, job)
        assert seen == list(range(1, 1204))

    run(engine, work)


def test_quiet_streams_get_keep_alives(engine: Engine, job: str) -> None:
    async def work(notifier: Notifier) -> None:
        lines = notifier.lines(job, 1, number)
        assert await anext(lines) == b": keep-alive\n\n"
        assert await anext(lines) == b": keep-alive\n\n"
        await asyncio.to_thread(say, engine, job)
        while (line := await anext(lines)) == b": keep-alive\n\n":  # before it was seen
            pass
        assert line == b"2"

    run(engine, work)


def test_closing_ends_streams_and_waits_at_once(engine: Engine, job: str) -> None:
    async def work(notifier: Notifier) -> None:
        async def follow() -> None:
            async for _ in notifier.lines(job, 0, number):
                pass

        waiting = [
            asyncio.create_task(follow()),
            asyncio.create_task(notifier.change("job", job, since="queued", timeout=100)),
        ]
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await notifier.close()
        await asyncio.gather(*waiting)
        assert time.monotonic() - started < PROMPT_SECONDS

    run(engine, work)


def test_a_database_that_is_away_is_survived(engine: Engine, job: str) -> None:
    async def work(notifier: Notifier) -> None:
        def refuse(*_: object) -> None:
            raise OSError("away")

        sqlalchemy_event.listen(engine, "before_cursor_execute", refuse)
        waiting = asyncio.create_task(notifier.change("job", job, since="queued", timeout=100))
        await asyncio.sleep(0.2)
        sqlalchemy_event.remove(engine, "before_cursor_execute", refuse)
        await asyncio.to_thread(cancel, engine, job)
        await asyncio.wait_for(waiting, PROMPT_SECONDS)

    run(engine, work)


def test_places_are_counted_per_key(engine: Engine) -> None:
    async def work(notifier: Notifier) -> None:
        leave = [notifier.enter("a") for _ in range(3)]
        with pytest.raises(TooManyRequests):
            notifier.enter("a")
        other = notifier.enter("b")
        assert notifier.open_streams == 4
        leave.pop()()
        leave.append(notifier.enter("a"))
        for each in (*leave, other):
            each()
        assert notifier.open_streams == 0

    run(engine, work)
