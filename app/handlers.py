"""The one place that turns an error into an answer: one body for ours, FastAPI's, Starlette's and the unexpected."""

from typing import Any, cast

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from app.domain.errors import (
    ApiError,
    Conflict,
    Detail,
    Expired,
    Forbidden,
    Invalid,
    Malformed,
    NotFound,
    RangeNotSatisfiable,
    TooLarge,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
)
from app.domain.pointers import pointer, sent_pointer
from app.http.idempotency import Replayed

log = structlog.get_logger(__name__)

_BY_STATUS: dict[int, type[ApiError]] = {
    kind.status: kind
    for kind in (
        Malformed, Unauthenticated, Forbidden, NotFound, Conflict, Expired, TooLarge, UnsupportedMedia,
        RangeNotSatisfiable, Invalid, TooManyRequests, Unavailable, ApiError,
    )
}  # fmt: skip


class MethodNotAllowed(ApiError):
    """This route does not know that method; see the header `Allow`."""

    status, type, code = 405, "invalid_request", "method_not_allowed"


def body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Give the body of an error."""
    return {
        "error": {
            "type": error.type, "code": error.code, "message": error.message, "param": error.param,
            "details": [detail.model_dump() for detail in error.details], "request_id": request_id, **error.facts,
        }
    }  # fmt: skip


def answer(error: ApiError, request_id: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Give the answer to an error, with the headers that its status asks for."""
    headers = dict(headers or {})
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None or error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after if error.retry_after is not None else 5)
    return JSONResponse(body(error, request_id), status_code=error.status, headers=headers)


def install(app: FastAPI) -> None:
    """Register every handler."""
    handlers: list[tuple[type[Exception], Any]] = [
        (ApiError, _on_api_error),
        (HTTPException, _on_http_exception),
        (RequestValidationError, _on_validation_error),
        (Replayed, _on_replayed),
        (OperationalError, _on_operational_error),
        (IntegrityError, _on_integrity_error),
        (ClientDisconnect, _on_disconnect),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def request_id_of(request: Request) -> str:
    """Give the id that the middleware gave this request."""
    return cast(str, request.state.request_id)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return answer(error, request_id_of(request))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        translated: ApiError = NotFound("There is no such route; see /docs.", code="no_such_route")
    elif error.status_code == 405:
        translated = MethodNotAllowed()
    elif error.status_code in _BY_STATUS:
        translated = _BY_STATUS[error.status_code]()
    else:
        translated = ApiError() if error.status_code >= 500 else Malformed()
    return answer(translated, request_id_of(request), headers)


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return answer(refusal(error, request.headers.get("content-type")), request_id_of(request))


def refusal(error: RequestValidationError, content_type: str | None) -> ApiError:
    """Turn FastAPI's validation errors into ours: the wrong content type, unreadable JSON, or values by pointer."""
    items: list[dict[str, Any]] = list(error.errors())
    if any(item["type"] == "json_invalid" for item in items):
        return Malformed("The body is not valid JSON.")
    about_whole_body = any(tuple(item["loc"]) == ("body",) and item["type"] != "missing" for item in items)
    if about_whole_body and not (content_type or "").startswith("application/json"):
        return UnsupportedMedia("Send the body as `Content-Type: application/json`.")
    details: list[Detail] = []
    for item in items:
        detail = Detail(pointer=_pointer(item, error.body), message=f"{_message(item)}.")
        if detail not in details:
            details.append(detail)
    first = details[0]
    param = first.pointer.removeprefix("/").replace("/", ".") or None
    return Invalid(f"{param or 'body'}: {first.message}", param=param, details=details)


def _message(item: dict[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "There is no such field here; check its spelling"
    if item["type"] == "missing":
        return "This field is required"
    return str(item["msg"]).removeprefix("Value error, ").rstrip(".")


def _pointer(item: dict[str, Any], sent: Any) -> str:
    where, *rest = item["loc"]
    if where != "body":
        return pointer([where, *rest])
    return sent_pointer(rest, sent, missing=item["type"] == "missing")


async def _on_replayed(_request: Request, replayed: Replayed) -> Response:
    return JSONResponse(
        replayed.body, status_code=replayed.status, headers={**replayed.headers, "Idempotent-Replayed": "true"}
    )


async def _on_operational_error(request: Request, error: OperationalError) -> Response:
    log.error("database.unavailable", exc_info=error)
    return answer(
        Unavailable("The database does not answer; try again.", code="database_unavailable"), request_id_of(request)
    )


async def _on_integrity_error(request: Request, error: IntegrityError) -> Response:
    # Checks before a write give the good message; this is the one who lost a race with the same name.
    log.warning("database.conflict", exc_info=error)
    return answer(
        Conflict("Another request changed this at the same moment; try again.", code="concurrent_change"),
        request_id_of(request),
    )


async def _on_disconnect(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody listens any more; nothing was kept
