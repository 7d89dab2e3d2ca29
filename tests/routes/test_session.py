"""The browser's cookie: traded for a key, good for reading, for writing only with a header that no form can send."""

from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy import Engine

from app.store import tables
from app.store.session import transaction
from tests.routes.conftest import Caller, Service, assert_error

pytestmark = pytest.mark.routes


@pytest.fixture
def browser(service: Service, caller: Caller) -> Iterator[httpx.Client]:
    """Sign a browser in with the caller's key."""
    with httpx.Client(base_url=service.url, trust_env=False, timeout=120) as http:
        answer = http.post("/v1/session", headers={"Authorization": f"Bearer {caller.key}"})
        assert answer.status_code == 201, answer.text
        assert set(answer.json()) == {"id", "object", "expires_at", "project", "scopes", "header", "created_at"}
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert caller.key not in cookie
        yield http


def test_reading_needs_only_the_cookie(browser: httpx.Client, caller: Caller) -> None:
    assert browser.get("/v1/me").json()["project"]["id"] == caller.project


def test_writing_also_needs_the_header(browser: httpx.Client) -> None:
    body = {"name": "d", "builtin": "digits"}
    assert_error(browser.post("/v1/datasets", json=body), 403, "session_header")
    assert_error(browser.delete("/v1/datasets/ds_x"), 403, "session_header")
    made = browser.post("/v1/datasets", json=body, headers={"X-Tuneyard-Session": "1"})
    assert made.status_code == 202


def test_a_session_does_not_prolong_itself(browser: httpx.Client) -> None:
    assert_error(browser.post("/v1/session", headers={"X-Tuneyard-Session": "1"}), 401)


def test_signing_out(browser: httpx.Client, caller: Caller) -> None:
    kept = dict(browser.cookies)
    answer = browser.delete("/v1/session", headers={"X-Tuneyard-Session": "1"})
    assert answer.json()["deleted"] is True
    assert not browser.cookies
    browser.cookies.update(kept)
    assert_error(browser.get("/v1/me"), 401)
    assert_error(caller.http.delete("/v1/session"), 404)


def test_a_session_ends_with_its_key(browser: httpx.Client, caller: Caller) -> None:
    me = browser.get("/v1/me").json()
    assert caller.http.delete(f"/v1/keys/{me['id']}").status_code == 200
    assert_error(browser.get("/v1/me"), 401)


def test_a_session_ends_with_its_time(browser: httpx.Client, caller: Caller, engine: Engine) -> None:
    me = browser.get("/v1/me").json()
    with transaction(engine) as session:
        session.query(tables.Session).filter_by(key_id=me["id"]).update({"expires_at": 1.0})
    assert_error(browser.get("/v1/me"), 401)
