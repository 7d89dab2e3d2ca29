"""The log of a job, as a list and as a stream."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.jobs import Actor, Status
from app.main import create_app
from app.store import events, life
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller, Service, assert_error, serve
from tests.waiting import until

pytestmark = pytest.mark.routes
MakeCaller = Callable[..., Caller]
STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def job(engine: Engine, caller: Caller) -> str:
    with transaction(engine) as session:
        made = factories.make_job(session, session.get_one(tables.Project, caller.project))
        factories.bring(session, made, Status.RUNNING)  # numbers 1, 2, 3
        return made.id


def say(engine: Engine, job_id: str, *codes: str) -> None:
    with transaction(engine) as session:
        job = life.lock(session, job_id)
        assert job is not None
        for code in codes:
            events.append(session, job, type="log", code=code, message="A line\nwith a break: “é”.", data={"x": None})


def end(engine: Engine, job_id: str) -> None:
    with transaction(engine) as session:
        job = life.lock(session, job_id)
        assert job is not None
        life.move(session, job, Status.STOPPED, actor=Actor.WORKER)


def read(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Read server-sent events as a browser would, comments included."""
    fields: dict[str, Any] = {}
    for line in response.iter_lines():
        if line.startswith(":"):
            yield {"comment": line}
        elif line:
            name, _, value = line.partition(": ")
            assert name not in fields, "a field twice in one event"
            fields[name] = value
        elif fields:
            yield fields
            fields = {}


def test_the_list(client: httpx.Client, engine: Engine, job: str) -> None:
    answer = client.get(f"/v1/jobs/{job}/events")
    assert answer.headers["content-type"].startswith("application/json")
    page = answer.json()
    assert (page["object"], page["has_more"]) == ("list", False)
    assert [event["number"] for event in page["data"]] == [1, 2, 3]
    assert page["last_id"] == page["data"][-1]["id"]
    first = page["data"][0]
    assert set(first) == {
        "id", "object", "number", "type", "code", "level", "message", "data", "attempt", "created_at",
    }  # fmt: skip
    assert (first["object"], first["type"], first["code"], first["level"]) == ("event", "status", "queued", "info")
    assert client.get(f"/v1/jobs/{job}/events", params={"after": 2}).json()["data"][0]["number"] == 3
    short = client.get(f"/v1/jobs/{job}/events", params={"limit": 2}).json()
    assert ([event["number"] for event in short["data"]], short["has_more"]) == ([1, 2], True)
    assert_error(client.get(f"/v1/jobs/{job}/events", params={"after": -1}), 422)


def test_the_stream_is_the_same_log_live_to_the_end(client: httpx.Client, engine: Engine, job: str) -> None:
    def go_on() -> None:
        for number in range(5):
            time.sleep(0.1)
            say(engine, job, f"line {number}", f"more {number}")
        end(engine, job)

    thread = threading.Thread(target=go_on)
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        thread.start()
        streamed = list(read(response))
    thread.join()
    listed = client.get(f"/v1/jobs/{job}/events").json()["data"]
    assert [json.loads(event["data"]) for event in streamed] == listed
    assert [int(event["id"]) for event in streamed] == list(range(1, 16))
    assert [event["event"] for event in streamed] == [event["type"] for event in listed]
    assert streamed[-1]["event"] == "done"
    assert json.loads(streamed[4]["data"])["message"] == "A line\nwith a break: “é”."


def test_a_broken_stream_goes_on_where_it_was(client: httpx.Client, engine: Engine, job: str) -> None:
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as response:
        reader = read(response)
        seen = [next(reader) for _ in range(2)]
    say(engine, job, "in between")
    end(engine, job)
    headers = STREAM | {"Last-Event-ID": seen[-1]["id"]}
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
        rest = list(read(response))
    assert [int(event["id"]) for event in seen + rest] == [1, 2, 3, 4, 5, 6]
    for last in ("6", "1000"):
        with client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM | {"Last-Event-ID": last}) as response:
            assert list(read(response)) == []  # over: it closes at once
    with client.stream("GET", f"/v1/jobs/{job}/events", params={"after": 5}, headers=STREAM) as response:
        assert [event["id"] for event in read(response)] == ["6"]


def test_a_long_log_is_streamed_whole(client: httpx.Client, engine: Engine, job: str) -> None:
    say(engine, job, *(f"line {number}" for number in range(700)))
    end(engine, job)
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as response:
        assert [int(event["id"]) for event in read(response)] == list(range(1, 706))


@pytest.mark.parametrize("wrong", ["abc", "-1", "1.5", "9" * 30, "²"])
def test_a_wrong_last_event_id(client: httpx.Client, job: str, wrong: str) -> None:
    headers = STREAM | {"Last-Event-ID": wrong.encode()}
    error = assert_error(client.get(f"/v1/jobs/{job}/events", headers=headers), 422)  # pyright: ignore[reportArgumentType]
    assert error["param"] == "Last-Event-ID"


def test_a_quiet_stream_is_kept_alive(service: Service, client: httpx.Client, job: str, engine: Engine) -> None:
    notifier = service.app.state.notifier
    usual, notifier._keep_alive_seconds = notifier._keep_alive_seconds, 0.1
    try:
        with client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as response:
            reader = read(response)
            found = [next(reader) for _ in range(6)]
            assert found[-1] == {"comment": ": keep-alive"}
            end(engine, job)
            assert [event for event in reader if "comment" not in event][-1]["event"] == "done"
    finally:
        notifier._keep_alive_seconds = usual


def test_streams_are_limited_per_key_and_given_back(service: Service, make_caller: MakeCaller, engine: Engine) -> None:
    caller = make_caller()
    with transaction(engine) as session:
        job = factories.make_job(session, session.get_one(tables.Project, caller.project)).id
    path = f"/v1/jobs/{job}/events"
    opened: list[Any] = []
    for _ in range(service.settings.streams_per_key):
        stream = caller.http.stream("GET", path, headers=STREAM)
        stream.__enter__()
        opened.append(stream)
    refused = caller.http.get(path, headers=STREAM)
    assert_error(refused, 429, "too_many_streams")
    assert refused.headers["retry-after"]
    assert caller.http.get(path).status_code == 200  # a list needs no place
    second = make_caller(project=caller.project)
    with second.http.stream("GET", path, headers=STREAM) as response:
        assert response.status_code == 200  # the limit is per key
    for stream in opened:
        stream.__exit__(None, None, None)
    until(lambda: service.app.state.notifier.open_streams == 0, what="who hangs up is not noticed")


def test_many_streams_of_one_job_get_the_same(client: httpx.Client, engine: Engine, job: str) -> None:
    results: list[list[int]] = []

    def follow() -> None:
        with client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM) as response:
            results.append([int(event["id"]) for event in read(response)])

    threads = [threading.Thread(target=follow) for _ in range(12)]
    for number, thread in enumerate(threads):
        thread.start()
        say(engine, job, f"line {number}")
    end(engine, job)
    for thread in threads:
        thread.join(60)
    assert results == [list(range(1, 18))] * 12


def test_a_stream_ends_when_the_server_does(service: Service, caller: Caller, job: str) -> None:
    own = service.settings.model_copy(update={"log_level": "error"})
    ended: list[float] = []

    def follow(url: str, ready: threading.Event) -> None:
        with (
            httpx.Client(base_url=url, headers=caller.http.headers, trust_env=False, timeout=120) as client,
            client.stream("GET", f"/v1/jobs/{job}/events", headers=STREAM, timeout=120) as response,
        ):
            reader = read(response)
            next(reader)
            ready.set()
            for _ in reader:
                pass
        ended.append(time.monotonic())

    ready = threading.Event()
    with serve(create_app(own), own) as running:
        thread = threading.Thread(target=follow, args=(running.url, ready))
        thread.start()
        assert ready.wait(60)
        # Uvicorn waits for open answers before it ends the lifespan: the signal itself must end them.
        running.app.state.notifier._loop.call_soon_threadsafe(running.app.state.notifier._end_streams)
        thread.join(30)
        assert ended, "the stream went on"


def test_another_projects_log_is_not_there(client: httpx.Client, make_caller: MakeCaller, engine: Engine) -> None:
    other = make_caller()
    with transaction(engine) as session:
        job = factories.make_job(session, session.get_one(tables.Project, other.project)).id
    assert_error(client.get(f"/v1/jobs/{job}/events"), 404)
    assert_error(client.get(f"/v1/jobs/{job}/events", headers=STREAM), 404)
