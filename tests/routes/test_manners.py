"""What holds on every route: one error body, request ids, safe headers, limits; a 2xx is committed when it is sent."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app import log
from app.deps import SessionDep
from app.domain.errors import TooManyRequests
from app.main import create_app
from app.settings import Settings
from app.store import migrate
from tests.routes.conftest import Service, assert_error, serve

pytestmark = pytest.mark.routes

broken = APIRouter(prefix="/broken")


@broken.post("/commit", status_code=201)
def commit(session: SessionDep) -> dict[str, bool]:
    # A deferred foreign key is checked by the commit itself, after the route has returned its 201.
    session.execute(text("create table if not exists a (id integer primary key)"))
    session.execute(
        text("create table if not exists b (id integer references a (id) deferrable initially deferred)")
    )  # fmt: skip
    session.execute(text("insert into b values (1)"))
    return {"made": True}


@broken.get("/crash")
def crash() -> None:
    raise RuntimeError("the secret is ty_0123456789abcdefABCDEF and postgresql://me:hunter2@db/x")


@broken.get("/away")
def away() -> None:
    raise OperationalError("select 1", {}, Exception("no connection"))


@broken.get("/busy")
def busy() -> None:
    raise TooManyRequests(retry_after=7)


@broken.get("/halfway")
def halfway() -> StreamingResponse:
    def pieces() -> Iterator[bytes]:
        yield b"first"
        raise RuntimeError("the disk is gone")

    return StreamingResponse(pieces())


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run an API that also has routes that break."""
    home = tmp_path_factory.mktemp("fragile")
    settings = Settings(home=home, max_body_bytes=2000, max_upload_bytes=5000, log_level="error")  # pyright: ignore[reportCallIssue]
    migrate.upgrade(settings.database)
    app = create_app(settings)
    app.include_router(broken)
    with serve(app, settings) as running:
        yield running


@pytest.fixture
def http(fragile: Service) -> Iterator[httpx.Client]:
    key = (fragile.settings.home_path / "key").read_text().strip()
    with httpx.Client(
        base_url=fragile.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=120
    ) as client:  # fmt: skip
        yield client


def test_a_failing_commit_is_no_success(http: httpx.Client) -> None:
    assert_error(http.post("/broken/commit"), 409, "concurrent_change")


def test_the_unexpected_shows_nothing_of_the_inside(http: httpx.Client, capfd: pytest.CaptureFixture[str]) -> None:
    error = assert_error(http.get("/broken/crash"), 500, "internal")
    assert "secret" not in json.dumps(error)
    logged = capfd.readouterr().err
    assert error["request_id"] in logged
    assert "Traceback" in logged
    assert "ty_01234567…" in logged
    assert "89abcdef" not in logged
    assert "hunter2" not in logged


def test_a_broken_answer_is_not_a_complete_one(http: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        http.get("/broken/halfway")


def test_a_database_that_is_away(http: httpx.Client) -> None:
    answer = http.get("/broken/away")
    assert_error(answer, 503, "database_unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_retry_after(http: httpx.Client) -> None:
    answer = http.get("/broken/busy")
    assert_error(answer, 429)
    assert answer.headers["retry-after"] == "7"


def test_what_frameworks_say_is_said_in_our_words(http: httpx.Client) -> None:
    assert_error(http.get("/nowhere"), 404, "no_such_route")
    answer = http.patch("/v1/projects")
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]
    assert_error(http.post("/v1/projects", content=b"{", headers={"Content-Type": "application/json"}), 400)
    assert_error(http.post("/v1/projects", content=b"name=x", headers={"Content-Type": "text/plain"}), 415)
    assert_error(http.post("/v1/projects", content=b'{"name": "x"}'), 415)
    assert_error(http.post("/v1/projects"), 422)
    assert_error(http.get("/v1/projects?after=%00"), 400)
    assert_error(http.get("/v1/datasets/%00"), 400)


def test_bodies_have_a_limit(http: httpx.Client) -> None:
    large = json.dumps({"name": "x" * 3000}).encode()
    json_header = {"Content-Type": "application/json"}
    assert_error(http.post("/v1/projects", content=large, headers=json_header), 413, "too_large")
    assert_error(http.post("/v1/projects", content=iter([large]), headers=json_header), 413, "too_large")
    assert_error(http.post("/v1/projects", content=iter([large]), headers={"Content-Type": "text/x"}), 413, "too_large")


def test_uploads_have_a_limit(http: httpx.Client) -> None:
    fits = http.post("/v1/datasets", files={"file": b"x" * 5000}, data={"name": "d"})
    assert fits.status_code == 202
    for size in (5001, 3_000_000):
        refused = http.post("/v1/datasets", files={"file": b"x" * size}, data={"name": "d"})
        assert_error(refused, 413, "too_large")


def test_headers(http: httpx.Client) -> None:
    for answer in (http.get("/v1/me"), http.get("/nowhere"), http.get("/broken/crash"), http.get("/healthz")):
        assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-frame-options"] == "DENY"
    given = http.get("/v1/me", headers={"X-Request-Id": "trace-0123456789"})
    assert given.headers["x-request-id"] == "trace-0123456789"
    assert http.get("/v1/me", headers={"X-Request-Id": "a b\t<script>"}).headers["x-request-id"].startswith("req_")


def test_secrets_never_reach_the_log() -> None:
    key = "ty_" + "Ab3-_" * 8
    for line in (f"key={key}", f'{{"authorization": "Bearer {key}"}}', f"tys_{key[3:]}", f"redis://:{key[3:]}@host/0"):
        redacted = log.redact(line)
        assert "Ab3-_Ab3-_" not in redacted
    assert log.redact("ty_01234567") == "ty_01234567"  # a prefix is no secret


def test_every_request_is_one_line_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = Settings(home=tmp_path)  # pyright: ignore[reportCallIssue]
    migrate.upgrade(settings.database)
    with serve(create_app(settings), settings) as running:
        key = (tmp_path / "key").read_text().strip()
        capfd.readouterr()
        httpx.get(f"{running.url}/v1/datasets/ds_x?name=private", headers={"Authorization": f"Bearer {key}"})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    log.configure(settings.model_copy(update={"log_level": "error"}))
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["route"] == "/v1/datasets/{dataset_id}"
    assert (line["status"], line["method"], line["key"], line["level"]) == (404, "GET", key[:11], "info")
    assert line["request_id"].startswith("req_")
    assert key not in json.dumps(lines)
    assert "private" not in json.dumps(lines)
    logging.getLogger().setLevel(logging.WARNING)
