"""Idempotency keys: the same call twice does its work once, for JSON and for uploads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, func, select

from app.store import idempotency, tables
from app.store.clock import Now
from app.store.session import transaction
from tests.routes.conftest import Caller, assert_error

pytestmark = pytest.mark.routes
BODY = {"name": "d", "builtin": "digits"}


def count(engine: Engine, caller: Caller) -> int:
    with transaction(engine, read_only=True) as session:
        query = select(func.count()).where(tables.Dataset.project_id == caller.project)
        return session.scalar(query) or 0


def post(caller: Caller, key: str, body: Any = None) -> httpx.Response:
    return caller.http.post("/v1/datasets", json=body or BODY, headers={"Idempotency-Key": key})


def upload(caller: Caller, key: str, data: bytes = b"data", name: str = "d") -> httpx.Response:
    return caller.http.post(
        "/v1/datasets", files={"file": data}, data={"name": name}, headers={"Idempotency-Key": key}
    )  # fmt: skip


@pytest.mark.parametrize("send", [post, upload])
def test_a_replay_gives_the_stored_answer(
    caller: Caller, engine: Engine, send: Callable[..., httpx.Response]
) -> None:  # fmt: skip
    first, again = send(caller, "k"), send(caller, "k")
    assert first.status_code == again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert count(engine, caller) == 1
    assert send(caller, "other").json()["id"] != first.json()["id"]


def test_another_body_is_refused(caller: Caller, engine: Engine) -> None:
    post(caller, "json")
    assert_error(post(caller, "json", BODY | {"name": "e"}), 422, "idempotency_mismatch")
    upload(caller, "form")
    assert_error(upload(caller, "form", data=b"other"), 422, "idempotency_mismatch")
    assert_error(upload(caller, "form", name="e"), 422, "idempotency_mismatch")
    assert count(engine, caller) == 2


def test_a_key_belongs_to_its_project(caller: Caller, make_caller: Callable[..., Caller]) -> None:
    assert post(caller, "k").json()["id"] != post(make_caller(), "k").json()["id"]


def test_a_refused_call_may_be_corrected(caller: Caller) -> None:
    assert_error(post(caller, "k", {"name": "d", "upload": "upl_x"}), 404)
    assert post(caller, "k").status_code == 202
    assert_error(upload(caller, "u", name=""), 422)
    assert upload(caller, "u").status_code == 202


def test_many_at_once_make_one(caller: Caller, engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(caller, "k"), range(16)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert count(engine, caller) == 1


def test_the_first_upload_is_still_running(caller: Caller, engine: Engine) -> None:
    begun, go_on = threading.Event(), threading.Event()
    head = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nd\r\n'
    tail = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ndata\r\n--x--\r\n'

    def slowly() -> Any:
        yield head
        begun.set()
        assert go_on.wait(60)
        yield tail

    headers = {"Idempotency-Key": "slow", "Content-Type": "multipart/form-data; boundary=x"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: caller.http.post("/v1/datasets", content=slowly(), headers=headers))
        assert begun.wait(60)
        while not running(engine, caller):
            pass
        assert_error(upload(caller, "slow"), 409, "idempotency_running")
        assert_error(post(caller, "slow"), 409, "idempotency_running")
        go_on.set()
        made = first.result(60)
    assert made.status_code == 202
    assert upload(caller, "slow").json() == made.json()


def running(engine: Engine, caller: Caller) -> bool:
    with transaction(engine, read_only=True) as session:
        query = select(tables.Idempotency).where(
            tables.Idempotency.project_id == caller.project, tables.Idempotency.status.is_(None)
        )
        return session.scalar(query) is not None


def test_a_dead_upload_is_taken_over_and_an_old_answer_forgotten(caller: Caller, engine: Engine) -> None:
    slot = (caller.project, "POST /v1/datasets", "k")
    with transaction(engine) as session:
        idempotency.reserve(session, slot, "dead")
    assert_error(upload(caller, "k"), 409)
    set_age(engine, slot, idempotency.ABANDONED_SECONDS + 1)
    first = upload(caller, "k")
    assert first.status_code == 202
    set_age(engine, slot, idempotency.LIFETIME_SECONDS - 60)
    assert upload(caller, "k").json() == first.json()
    set_age(engine, slot, idempotency.LIFETIME_SECONDS + 1)
    assert upload(caller, "k").json()["id"] != first.json()["id"]


def set_age(engine: Engine, slot: idempotency.Slot, seconds: float) -> None:
    with transaction(engine) as session:
        session.execute(
            tables.Idempotency.__table__.update()  # pyright: ignore[reportAttributeAccessIssue]
            .where(tables.Idempotency.project_id == slot[0], tables.Idempotency.key == slot[2])
            .values(created_at=Now() - seconds)
        )


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_bad_keys(caller: Caller, key: str) -> None:
    assert_error(post(caller, key), 422)
