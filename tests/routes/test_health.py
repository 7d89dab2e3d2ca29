"""Health, readiness, metrics, and the first key."""

import math
import os
import stat
import threading
from pathlib import Path

import httpx
import pytest
from celery import Celery
from pydantic import SecretStr
from sqlalchemy import Engine, text

from app.bootstrap import ensure_first_key
from app.main import create_app
from app.settings import Settings
from app.store import keys, migrate, tables
from app.store.session import make_engine, transaction
from tests import factories
from tests.routes.conftest import Caller, assert_error, serve
from tests.waiting import until

pytestmark = pytest.mark.routes
ADMIN_KEY = "ty_0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def fresh(tmp_path: Path) -> Settings:
    """Give settings with a migrated database of their own."""
    settings = Settings(home=tmp_path, free_space_floor_bytes=0, log_level="error")  # pyright: ignore
    migrate.upgrade(settings.database)
    return settings


def test_up_and_ready(anonymous: httpx.Client) -> None:
    assert anonymous.get("/healthz").json() == {"status": "ok"}
    ready = anonymous.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ok", "checks": {"database": "ok", "storage": "ok", "redis": "off"}, "messages": [],
    }  # fmt: skip


def test_without_redis_it_is_degraded_and_serves(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = fresh.model_copy(update={"redis_url": f"redis+socket://:pw@{fresh.home}/none.sock?virtual_host=0"})
    answered, waited = threading.Event(), list[bool]()

    def stuck(*_: object, **__: object) -> None:
        waited.append(answered.wait(60))
        raise OSError("there is no Redis")

    monkeypatch.setattr(Celery, "send_task", stuck)
    monkeypatch.setattr("app.broker.STALE_SECONDS", math.inf)
    with serve(create_app(settings), settings) as running:
        ready = httpx.get(f"{running.url}/readyz", trust_env=False, timeout=120)
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert ready.json()["checks"]["redis"] == "failed"
        key = (settings.home_path / "key").read_text().strip()
        made = httpx.post(
            f"{running.url}/v1/datasets", json={"name": "d", "builtin": "digits"}, trust_env=False,
            headers={"Authorization": f"Bearer {key}"}, timeout=120,
        )  # fmt: skip
        answered.set()
        assert made.status_code == 202
        assert until(lambda: waited) == [True], "the answer waited for Redis"


def test_another_schema_is_not_ready(fresh: Settings) -> None:
    with serve(create_app(fresh), fresh) as running:
        engine = make_engine(fresh.database)
        with transaction(engine) as session:
            session.execute(text("update alembic_version set version_num = 'older'"))
        engine.dispose()
        ready = httpx.get(f"{running.url}/readyz", trust_env=False)
    assert ready.status_code == 503
    assert ready.json()["status"] == "unavailable"
    assert "tuneyard db upgrade" in ready.json()["messages"][0]


def test_a_full_disk_is_not_ready_and_takes_no_uploads(fresh: Settings) -> None:
    settings = fresh.model_copy(update={"free_space_floor_bytes": 2**60})
    with serve(create_app(settings), settings) as running:
        assert httpx.get(f"{running.url}/readyz", trust_env=False).status_code == 503
        key = (settings.home_path / "key").read_text().strip()
        refused = httpx.post(
            f"{running.url}/v1/datasets", files={"file": b"x"}, data={"name": "d"}, trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        )  # fmt: skip
    assert_error(refused, 503, "insufficient_storage")
    assert "retry-after" in refused.headers


def test_metrics(anonymous: httpx.Client, caller: Caller, engine: Engine) -> None:
    def value(name: str) -> float:
        lines = anonymous.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).rsplit(" ", 1)[1])

    before = value('tuneyard_jobs{status="queued"}'), value('tuneyard_claims_total{source="poll"}')
    with transaction(engine) as session:
        job = factories.make_job(session, session.get_one(tables.Project, caller.project))
        session.add(tables.Attempt(job_id=job.id, attempt=1, worker="w", source="poll"))
    assert value('tuneyard_jobs{status="queued"}') == before[0] + 1
    assert value('tuneyard_claims_total{source="poll"}') == before[1] + 1
    caller.http.get("/v1/datasets/ds_x")
    counted = 'tuneyard_http_request_seconds_count{method="GET",route="/v1/datasets/{dataset_id}",status="404"}'
    assert value(counted) >= 1
    with transaction(engine) as session:
        session.get_one(tables.Job, job.id).status = "cancelled"


def test_in_production_metrics_are_the_operators(fresh: Settings) -> None:
    settings = fresh.model_copy(update={"mode": "production", "admin_key": SecretStr(ADMIN_KEY)})
    with serve(create_app(settings), settings) as running, httpx.Client(base_url=running.url, trust_env=False) as http:
        assert_error(http.get("/metrics"), 401)
        assert_error(http.get("/metrics", headers={"Authorization": "Bearer ty_wrong"}), 401)
        operator = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert http.get("/metrics", headers=operator).status_code == 200
        reader = http.post("/v1/keys", json={"name": "r", "scopes": ["read"]}, headers=operator).json()["key"]
        assert_error(http.get("/metrics", headers={"Authorization": f"Bearer {reader}"}), 403)
        assert http.get("/healthz").status_code == 200
        assert not (settings.home_path / "key").exists()


def test_the_first_key_is_made_once_and_only_its_owner_reads_it(fresh: Settings) -> None:
    engine = make_engine(fresh.database)
    path = fresh.home_path / "key"
    old_mask = os.umask(0)
    try:
        ensure_first_key(engine, fresh)
    finally:
        os.umask(old_mask)
    secret = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ensure_first_key(engine, fresh)
    assert path.read_text().strip() == secret
    with transaction(engine, read_only=True) as session:
        principal = keys.authenticate(session, secret)
        assert principal is not None
        assert principal.scopes == {"read", "write", "admin", "operator"}
    engine.dispose()


def test_a_new_admin_key_replaces_the_old_one(fresh: Settings) -> None:
    engine = make_engine(fresh.database)
    second = "ty_" + ADMIN_KEY[:2:-1]
    for secret in (ADMIN_KEY, ADMIN_KEY, second):
        ensure_first_key(engine, fresh.model_copy(update={"admin_key": SecretStr(secret)}))
    with transaction(engine, read_only=True) as session:
        assert keys.authenticate(session, ADMIN_KEY) is None
        assert keys.authenticate(session, second) is not None
    engine.dispose()


def test_the_last_operator_key_stays(fresh: Settings) -> None:
    with serve(create_app(fresh), fresh) as running, httpx.Client(base_url=running.url, trust_env=False) as http:
        http.headers["Authorization"] = f"Bearer {(fresh.home_path / 'key').read_text().strip()}"
        me = http.get("/v1/me").json()
        assert_error(http.delete(f"/v1/keys/{me['id']}"), 409, "last_operator_key")
        http.post("/v1/keys", json={"name": "second", "scopes": ["operator"]})
        assert http.delete(f"/v1/keys/{me['id']}").status_code == 200
