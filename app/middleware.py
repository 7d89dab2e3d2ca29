"""What surrounds every request: an id, limits on its body, safe headers, a log line, an answer whatever breaks."""

import json
import re
import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import handlers
from app.domain.errors import ApiError, Malformed, TooLarge
from app.settings import Settings

log = structlog.get_logger(__name__)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_DEFAULT_HEADERS = {  # a route that serves bytes or a page sets its own
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_FORM_OVERHEAD = 2**20  # the fields and boundaries around an uploaded file
_MAX_DEPTH = 32

Observe = Callable[[str, str, int, float], None]


class Surroundings:
    """The one ASGI middleware."""

    def __init__(self, app: ASGIApp, *, settings: Settings, observe: Observe) -> None:
        self._app, self._settings, self._observe = app, settings, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{8,64}", given) else "req_" + secrets.token_hex(12)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                answer_headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    answer_headers[name] = value
                for name, value in _DEFAULT_HEADERS.items():
                    answer_headers.setdefault(name, value)
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            checked = await self._checked(scope, headers, receive)
            if checked is not None:
                await self._app(scope, checked, dressed)
        except ApiError as error:
            await handlers.answer(error, request_id)(scope, receive, dressed)
        except Exception as error:
            log.error("request.failed", method=scope["method"], exc_info=error)
            if status:
                raise  # the answer has begun; breaking the connection is the only way to say that it is incomplete
            await handlers.answer(ApiError(), request_id)(scope, receive, dressed)
        finally:
            seconds = time.perf_counter() - started
            route = str(getattr(scope.get("route"), "path", "unknown"))
            self._observe(cast(str, scope["method"]), route, status, seconds)
            log.info(
                "request", method=scope["method"], route=route, status=status, milliseconds=round(seconds * 1000, 1),
                key=state.get("key_prefix"),
            )  # fmt: skip

    async def _checked(self, scope: Scope, headers: Headers, receive: Receive) -> Receive | None:
        """Refuse what is too large or cannot be read, before any route sees it; None when the client has gone."""
        if b"%00" in cast(bytes, scope.get("query_string", b"")) or "\x00" in scope["path"]:
            raise Malformed("Take the NUL character out of the address.")
        content_type = headers.get("content-type", "")
        if content_type.startswith("multipart/form-data"):
            limit = self._settings.max_upload_bytes + _FORM_OVERHEAD
        else:
            limit = self._settings.max_body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise TooLarge(f"The body has {declared} bytes; at most {limit} are accepted here.")
        if content_type.startswith("application/json") and scope["method"] not in ("GET", "HEAD"):
            body = await _read(receive, limit)
            if body is None:
                return None
            _check_json(body)
            return _again(body, receive)
        return _counted(receive, limit)


async def _read(receive: Receive, limit: int) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise TooLarge(f"The body has more than {limit} bytes.")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _counted(receive: Receive, limit: int) -> Receive:
    total = 0

    async def count() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            # FastAPI lets only this class through while it reads a body; the handler says it in our words.
            raise HTTPException(413)
        return message

    return count


def _check_json(body: bytes) -> None:
    """Refuse what Python's reader takes for JSON although it is none, and text that no database stores."""
    if not body:
        return
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise Malformed(f"The JSON is nested deeper than {_MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise Malformed(f"The body is not valid JSON: {error}.") from None
    _check_value(value, may_hide="\\u" in text, depth=0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON; send null")


def _check_value(value: Any, *, may_hide: bool, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise Malformed(f"The JSON is nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, str):
        if may_hide and any(character == "\x00" or "\ud800" <= character <= "\udfff" for character in value):
            raise Malformed("Take NUL characters and lone surrogates out of the text.")
    elif isinstance(value, dict):
        for key, item in cast(dict[str, Any], value).items():
            _check_value(key, may_hide=may_hide, depth=depth)
            _check_value(item, may_hide=may_hide, depth=depth + 1)
    elif isinstance(value, list):
        for item in cast(list[Any], value):
            _check_value(item, may_hide=may_hide, depth=depth + 1)
