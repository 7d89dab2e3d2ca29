"""`/v1/session`: a browser trades a key for a cookie that no script can read."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from app.deps import COOKIE, SESSION_HEADER, PrincipalDep, SessionDep, SettingsDep
from app.domain.errors import NotFound, Unauthenticated
from app.http.envelope import Deleted, Object, as_time
from app.store import keys
from app.store.keys import Scope

router = APIRouter(prefix="/v1/session", tags=["session"])


class SessionOut(Object):
    """A browser session; it ends with its key at the latest."""

    object: Literal["session"] = "session"
    created_at: datetime
    expires_at: datetime
    project: str
    scopes: list[Scope]
    header: Annotated[str, Field(description="Writes with the cookie also need this header, with any value.")]


@router.post("", status_code=201)
def create(
    request: Request, response: Response, session: SessionDep, principal: PrincipalDep, settings: SettingsDep
) -> SessionOut:
    """Trade the key of this call for an HttpOnly, SameSite=Strict cookie."""
    if principal.by_cookie:
        raise Unauthenticated("Send the key itself: a session does not prolong itself.")
    opened, token = keys.open_session(session, principal.key_id)
    response.set_cookie(
        COOKIE, token, max_age=int(keys.SESSION_SECONDS), path="/", httponly=True, samesite="strict",
        secure=settings.mode == "production" or request.url.scheme == "https",
    )  # fmt: skip
    return SessionOut(
        id=opened.id, created_at=as_time(opened.created_at), expires_at=as_time(opened.expires_at),
        project=principal.project_id,
        scopes=[scope for scope in keys.SCOPES if scope in principal.scopes], header=SESSION_HEADER,
    )  # fmt: skip


@router.delete("")
def delete(request: Request, response: Response, session: SessionDep, principal: PrincipalDep) -> Deleted:
    """Sign out: the cookie of this call ends; calls with a key have none to end."""
    token = request.cookies.get(COOKIE)
    closed = keys.close_session(session, token, principal.key_id) if token else None
    if closed is None:
        raise NotFound("This call carries no session to end.")
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return Deleted(id=closed, object="session")
