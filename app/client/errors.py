"""What a call to the server can end in, besides its answer."""

from typing import Any


class ClientError(Exception):
    """A call did not give what was asked for; the message says what to do."""


class Refused(ClientError):
    """The server said no. Carries its error body: `type`, `code`, `message`, `param`, `details`, `request_id`.

    `body` is the whole `error` object, with the extra fields that some errors have (a 409's current `status`).
    """

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status, self.body = status, body
        self.type = str(body.get("type", "unknown"))
        self.code = str(body.get("code", "unknown"))
        self.message = str(body.get("message", f"The server answered {status}."))
        self.param: str | None = body.get("param")
        self.details: list[dict[str, str]] = list(body.get("details") or ())
        self.request_id: str | None = body.get("request_id")
        super().__init__(self.message)


class Unreachable(ClientError):
    """No answer came: the server is not there, or the connection broke more often than it may."""


class Damaged(ClientError):
    """Downloaded bytes do not have the digest that the server promised; they were removed."""


class Misplaced(ClientError):
    """A key, a file or a folder that the call needs is not there."""
