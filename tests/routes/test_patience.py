"""`?wait=`: the answer comes with the next change, and waiting costs neither threads nor connections."""

import threading
import time
from collections.abc import Callable

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.jobs import Actor, Status
from app.store import life
from app.store.session import transaction
from tests.routes.conftest import Caller, Service, assert_error
from tests.routes.submitting import make_job
from tests.waiting import until

pytestmark = [pytest.mark.routes, pytest.mark.usefixtures("catalogue")]
MakeCaller = Callable[..., Caller]


def test_waiting_answers_at_the_next_change(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = make_job(engine, caller)

    def cancel_soon() -> None:
        time.sleep(0.4)
        with transaction(engine) as session:
            locked = life.lock(session, job)
            assert locked is not None
            life.move(session, locked, Status.CANCELLED, actor=Actor.API)

    thread = threading.Thread(target=cancel_soon)
    thread.start()
    started = time.monotonic()
    answer = client.get(f"/v1/jobs/{job}", params={"wait": 60})
    thread.join()
    assert answer.json()["status"] == "cancelled"
    assert 0.3 < time.monotonic() - started < 30
    started = time.monotonic()
    assert client.get(f"/v1/jobs/{job}", params={"wait": 60}).json()["status"] == "cancelled"
    assert time.monotonic() - started < 30  # it has ended: nothing more will change


def test_waiting_ends_when_the_time_is_up(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    job = make_job(engine, caller)
    started = time.monotonic()
    assert client.get(f"/v1/jobs/{job}", params={"wait": 0.5}).json()["status"] == "queued"
    assert 0.4 < time.monotonic() - started < 30
    assert_error(client.get(f"/v1/jobs/{job}", params={"wait": -1}), 422)


def test_many_who_wait_hold_neither_threads_nor_connections(
    service: Service, make_caller: MakeCaller, engine: Engine
) -> None:
    caller = make_caller()
    job = make_job(engine, caller)
    waiting = [
        threading.Thread(target=lambda: caller.http.get(f"/v1/jobs/{job}", params={"wait": 60})) for _ in range(20)
    ]  # fmt: skip
    for thread in waiting:
        thread.start()
    notifier = service.app.state.notifier
    until(lambda: notifier.open_streams >= 20)
    with httpx.Client(base_url=service.url, headers=caller.http.headers, trust_env=False, timeout=60) as other:
        assert_error(other.get(f"/v1/jobs/{job}", params={"wait": 5}), 429, "too_many_streams")
        started = time.monotonic()
        assert other.post(f"/v1/jobs/{job}/cancel").status_code == 202
        assert time.monotonic() - started < 30
    for thread in waiting:
        thread.join(30)
        assert not thread.is_alive()
    assert notifier.open_streams == 0
