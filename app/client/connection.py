"""One connection to the server: keys, retries, and errors as exceptions. What every resource of the client speaks over.

Every POST carries an `Idempotency-Key`, so sending it again after a lost connection can never do its work twice.
"""

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from app.client.errors import Refused, Unreachable

# Statuses that say "not now": a full queue, a restart, a gateway whose server is away.
_PASSING = frozenset({429, 502, 503, 504})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
Answer = TypeVar("Answer")


class Connection:
    """HTTP with manners: bearer key, typed errors, and repeats with back-off while `patience` seconds last."""

    def __init__(
        self, base_url: str, key: str, *, patience: float, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.base_url, self.patience = base_url, patience
        self.reached = False
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}", "User-Agent": "tuneyard"},
            timeout=httpx.Timeout(30, connect=5),
            transport=transport,
            # A proxy from the environment cannot reach this machine's own loopback.
            trust_env=urlsplit(base_url).hostname not in _LOOPBACK,
        )

    def close(self) -> None:
        """Give the sockets back."""
        self._http.close()

    def get(self, path: str, *, timeout: float | None = None, **params: Any) -> Any:
        """GET JSON; parameters that are None are left out."""
        return self.send("GET", path, params=_given(params), timeout=timeout).json()

    def post(self, path: str, body: Mapping[str, Any] | None = None, **params: Any) -> Any:
        """POST JSON, get JSON."""
        return self.send("POST", path, params=_given(params), json=dict(body or {})).json()

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        """PATCH JSON, get JSON."""
        return self.send("PATCH", path, json=dict(body)).json()

    def delete(self, path: str) -> Any:
        """DELETE, get JSON."""
        return self.send("DELETE", path).json()

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **content: Any,
    ) -> httpx.Response:
        """Send one request until it is answered or patience ends; files in `content` are rewound by httpx.

        Raises:
            Refused: the server said no.
            Unreachable: no answer came.
        """
        given = dict(headers or {})
        if method == "POST":
            given.setdefault("Idempotency-Key", str(uuid.uuid4()))
        # A long poll holds its answer back on purpose.
        limit = httpx.USE_CLIENT_DEFAULT if timeout is None else httpx.Timeout(timeout, connect=5)

        def once() -> httpx.Response:
            response = self._http.request(method, path, params=params, headers=given, timeout=limit, **content)
            self.reached = True
            return _checked(response)

        return self.persist(once)

    @contextmanager
    def stream(
        self, path: str, *, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Iterator[httpx.Response]:
        """GET a body piece by piece. No repeats: who reads a stream knows how to go on from the middle."""
        given = {"Accept-Encoding": "identity", **(headers or {})}
        with self._http.stream("GET", path, headers=given, timeout=httpx.Timeout(timeout, connect=5)) as response:
            self.reached = True
            if response.is_error:
                response.read()
            yield _checked(response)

    def persist(self, attempt: Callable[[], Answer]) -> Answer:
        """Call `attempt` again after a lost connection or a passing refusal, with back-off."""
        patience = Patience(self)
        while True:
            try:
                return attempt()
            except LOST as error:
                patience.wait(error)

    def absence(self, error: Exception) -> str:
        """Say that no answer came, why, and what to do."""
        reason = str(error) or type(error).__name__
        if self.reached:
            return f"The connection to {self.base_url} was lost and did not come back: {reason}."
        return (
            f"No server answers at {self.base_url} ({reason}). Start one with `tuneyard up`, "
            "or name another with --url or TUNEYARD_URL."
        )


class Passing(Exception):
    """A refusal that may be gone in a moment; ends as its `refusal` when patience does."""

    def __init__(self, refusal: Refused, retry_after: float) -> None:
        self.refusal, self.retry_after = refusal, retry_after
        super().__init__(refusal.message)


# What is worth another try.
LOST = (httpx.TransportError, Passing)


class Patience:
    """Counts out the pauses between repeats: 0.1 s, doubling to 2 s, until the connection's patience is used up.

    A server that never answered yet is most likely not running, so there patience is short.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.renew()

    def renew(self) -> None:
        """Start counting afresh: something arrived."""
        self._started, self._pause = time.monotonic(), 0.1

    def wait(self, error: Exception) -> None:
        """Sleep before the next try.

        Raises:
            Refused: the server went on refusing.
            Unreachable: the connection did not come back.
        """
        passing = error if isinstance(error, Passing) else None
        pause = max(self._pause, passing.retry_after) if passing else self._pause
        patience = self._connection.patience if self._connection.reached else min(self._connection.patience, 1.0)
        if time.monotonic() - self._started + pause > patience:
            raise passing.refusal if passing else Unreachable(self._connection.absence(error)) from error
        time.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - spreads repeats, guards nothing
        self._pause = min(self._pause * 2, 2.0)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    refusal = Refused(response.status_code, _error_body(response))
    if response.status_code in _PASSING or refusal.code == "idempotency_running":
        after = response.headers.get("Retry-After", "")
        raise Passing(refusal, float(after) if after.isdigit() else 0.0)
    raise refusal


def _error_body(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        body = None
    if isinstance(body, dict):
        return body
    text = response.text.strip()[:200]  # not one of ours: a proxy, or another server on this port
    return {"message": f"The server answered {response.status_code}" + (f": {text}" if text else ".")}


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: value for key, value in params.items() if value is not None}
    metadata = named.pop("metadata", None) or {}
    return named | {f"metadata[{key}]": value for key, value in metadata.items()}
