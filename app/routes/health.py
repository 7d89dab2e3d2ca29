"""`/healthz`, `/readyz`, `/metrics`: for whoever runs the service."""

import os
import secrets
import shutil
from collections.abc import Callable
from typing import Literal, cast

import structlog
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Engine

from app.deps import DatabaseDep, NotifierDep, SettingsDep, operator_unless_local
from app.http.envelope import Out
from app.http.prometheus import Exposition
from app.settings import Settings

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


class Health(Out):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Readiness(Out):
    """Whether the service can work. `degraded` is ready too: without Redis, jobs are found by polling."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[Literal["database", "storage", "redis"], Literal["ok", "failed", "off"]]
    messages: list[str]


@router.get("/healthz")
async def healthz() -> Health:
    """Say that the process is up; asks nobody."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Cannot work"}})
def readyz(database: DatabaseDep, settings: SettingsDep, response: Response) -> Readiness:
    """Say whether jobs can be accepted: database, its schema, storage; and Redis, which is not needed for that."""
    messages: list[str] = []

    def passed(name: str, check: Callable[[], str | None]) -> bool:
        try:
            message = check()
        except Exception as error:  # whatever it is, this check did not pass; the reason is for the log only
            log.warning("not_ready", check=name, error=str(error))
            message = f"The {name} does not answer."
        if message is not None:
            messages.append(message)
        return message is None

    works = passed("database", lambda: _schema(database.engine))
    stores = passed("storage", lambda: _storage(settings))
    hints = settings.redis_url is None or passed("redis", lambda: _redis(settings))
    if not (works and stores):
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return Readiness(
        status="unavailable" if not (works and stores) else "ok" if hints else "degraded",
        checks={
            "database": "ok" if works else "failed",
            "storage": "ok" if stores else "failed",
            "redis": "off" if settings.redis_url is None else "ok" if hints else "failed",
        },
        messages=messages,
    )


def _schema(engine: Engine) -> str | None:
    from app.store import migrate  # alembic is asked here only

    current, head = migrate.current(engine), migrate.head()
    if current == head:
        return None
    return f"The database has schema {current} and this version needs {head}; run `tuneyard db upgrade`."


def _storage(settings: Settings) -> str | None:
    home = settings.home_path
    probe = home / f".ready-{secrets.token_hex(8)}"
    probe.write_bytes(b"")
    os.unlink(probe)
    if shutil.disk_usage(home).free < settings.free_space_floor_bytes:
        return "The disk is nearly full; uploads are refused. Free some space or set TUNEYARD_FREE_SPACE_FLOOR_BYTES."
    return None


def _redis(settings: Settings) -> str | None:
    import redis

    # kombu writes a socket as redis+socket://…?virtual_host=0, redis-py as unix://…?db=0.
    url = (settings.redis_url or "").replace("redis+socket://", "unix://").replace("virtual_host=", "db=")
    with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1, retry=None) as client:
        client.ping()
    return None


@router.get(
    "/metrics", dependencies=[Depends(operator_unless_local)], response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}},
)  # fmt: skip
def metrics(request: Request, notifier: NotifierDep) -> Response:
    """Give metrics in Prometheus' text format; outside local mode this needs an operator's key."""
    exposition = cast(Exposition, request.app.state.exposition)
    content, content_type = exposition.render(notifier.open_streams)
    return Response(content, headers={"Content-Type": content_type})
