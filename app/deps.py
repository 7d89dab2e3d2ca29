"""What routes ask for: a transaction, the bytes, who calls and with which scope, a page, an object that is yours."""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Literal, cast

from fastapi import Depends, Header, Path, Query, Request, Response, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.database import Database
from app.domain.errors import Detail, Forbidden, Invalid, Unauthenticated
from app.http.idempotency import Once
from app.http.notifier import Notifier
from app.settings import Settings
from app.store import keys, owned, tables
from app.store.blobs import Blobs
from app.store.keys import Principal
from app.store.page import Page

COOKIE = "tuneyard_session"
SESSION_HEADER = "X-Tuneyard-Session"

_bearer = HTTPBearer(
    auto_error=False, bearerFormat="ty_…", scheme_name="key", description="A key of the project, `ty_…`."
)  # fmt: skip
_cookie = APIKeyCookie(
    name=COOKIE, auto_error=False, scheme_name="session",
    description=f"A browser's session; writes also need the header `{SESSION_HEADER}`.",
)  # fmt: skip


def _database(request: Request) -> Database:
    return cast(Database, request.app.state.database)


def _blobs(request: Request) -> Blobs:
    return cast(Blobs, request.app.state.blobs)


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _notifier(request: Request) -> Notifier:
    return cast(Notifier, request.app.state.notifier)


DatabaseDep = Annotated[Database, Depends(_database)]
BlobsDep = Annotated[Blobs, Depends(_blobs)]
SettingsDep = Annotated[Settings, Depends(_settings)]
NotifierDep = Annotated[Notifier, Depends(_notifier)]


def _session(request: Request, database: DatabaseDep) -> Iterator[Session]:
    with database.session(read_only=request.method in ("GET", "HEAD")) as session:
        yield session


# The scope `function` ends the dependency, and so commits, before the answer is sent: a 2xx is durable.
SessionDep = Annotated[Session, Depends(_session, scope="function")]


def _principal(
    request: Request,
    scopes: SecurityScopes,
    database: DatabaseDep,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    cookie: Annotated[str | None, Depends(_cookie)],
) -> Principal:
    """Find out who calls, in a short transaction of its own, so that a route that waits holds none."""
    principal: Principal | None = None
    with database.session(read_only=True) as session:
        if bearer is not None:
            principal = keys.authenticate(session, bearer.credentials)
        elif cookie is not None:
            principal = keys.authenticate_session(session, cookie)
    if principal is None:
        raise Unauthenticated()
    request.state.key_prefix = principal.prefix
    if principal.by_cookie and request.method not in ("GET", "HEAD") and not request.headers.get(SESSION_HEADER):
        # A form on another site can send the cookie in some browsers, but never this header.
        raise Forbidden(f"Writes with a session cookie need the header {SESSION_HEADER}: 1.", code="session_header")
    for scope in scopes.scopes:
        if scope not in principal.scopes:
            raise Forbidden(f"This call needs a key with the scope {scope}.", required_scope=scope)
    if principal.stale:
        with suppress(OperationalError), database.session() as session:  # a busy database is no reason to refuse
            keys.touch(session, principal.key_id)
    return principal


PrincipalDep = Annotated[Principal, Security(_principal)]
ReadDep = Annotated[Principal, Security(_principal, scopes=["read"])]
WriteDep = Annotated[Principal, Security(_principal, scopes=["write"])]
AdminDep = Annotated[Principal, Security(_principal, scopes=["admin"])]
OperatorDep = Annotated[Principal, Security(_principal, scopes=["operator"])]


def operator_unless_local(
    request: Request,
    settings: SettingsDep,
    database: DatabaseDep,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    cookie: Annotated[str | None, Depends(_cookie)],
) -> None:
    """Let everybody on this machine in local mode, and operators only elsewhere."""
    if settings.mode != "local":
        _principal(request, SecurityScopes(["operator"]), database, bearer, cookie)


def _page(
    limit: Annotated[int, Query(ge=1, le=1000, description="Most objects on the page.")] = 20,
    after: Annotated[
        str | None, Query(pattern=r"^[a-z]{2,5}_[0-9a-z]{26}$", description="The `last_id` of the page before.")
    ] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By age; `desc` gives the newest first.")] = "desc",
) -> Page:
    return Page(limit=limit, after=after, order=order)


PageDep = Annotated[Page, Depends(_page)]


def _metadata_filter(request: Request) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if (match := re.fullmatch(r"metadata\[(.*)\]", name, re.DOTALL)) is not None:
            if not 1 <= len(match[1]) <= 64 or '"' in match[1] or "\\" in match[1]:
                message = "Filter by a key of 1 to 64 characters without quotes and backslashes."
                raise Invalid(message, param="metadata", details=[Detail(pointer="/query/metadata", message=message)])
            wanted[match[1]] = value
    return wanted


MetadataFilterDep = Annotated[dict[str, str], Depends(_metadata_filter)]

# FastAPI cannot describe `?metadata[k]=v` by a type; a list route adds this as its `openapi_extra`.
METADATA_FILTER = {
    "parameters": [
        {
            "name": "metadata", "in": "query", "style": "deepObject", "explode": True, "required": False,
            "description": "Only objects with these metadata: `?metadata[key]=value`.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}  # fmt: skip

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[!-~]+$",
        description="The same key and body give the stored answer again, for 24 hours.",
    ),
]  # fmt: skip


def _once(
    request: Request,
    response: Response,
    session: SessionDep,
    principal: PrincipalDep,
    key: IdempotencyKey = None,
) -> Once:  # fmt: skip
    return Once(
        session, response, project_id=principal.project_id, route=f"{request.method} {request.url.path}", key=key,
        status=request.scope["route"].status_code or 200,
    )  # fmt: skip


OnceDep = Annotated[Once, Depends(_once)]


def _dataset(
    dataset_id: Annotated[str, Path(description="`ds_…`")], session: SessionDep, principal: PrincipalDep
) -> tables.Dataset:
    return owned.find(session, tables.Dataset, dataset_id, principal.project_id)


def _job(
    job_id: Annotated[str, Path(description="`job_…`")], session: SessionDep, principal: PrincipalDep
) -> tables.Job:
    return owned.find(session, tables.Job, job_id, principal.project_id)


DatasetDep = Annotated[tables.Dataset, Depends(_dataset)]
JobDep = Annotated[tables.Job, Depends(_job)]
