"""The typed HTTP client: `from app.client import Client`. Independent of the server's code."""

from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from app.client.connection import Connection
from app.client.datasets import Datasets
from app.client.errors import ClientError, Damaged, Misplaced, Refused, Unreachable
from app.client.jobs import Jobs
from app.client.keys import Keys
from app.client.models import Models
from app.client.objects import ENDED, Json, Page, Worker
from app.client.place import home_folder, server_key, server_url
from app.client.projects import Projects
from app.client.recipes import Recipes

__all__ = [
    "ENDED", "Client", "ClientError", "Damaged", "Misplaced", "Refused", "Unreachable", "answers", "home_folder",
]  # fmt: skip


class Client:
    """Everything the server offers, by noun.

    The address is `base_url`, else `TUNEYARD_URL`, else that of the stack on the home; the key is `key`, else
    `TUNEYARD_KEY`, else the file `key` in the home. `patience` is how many seconds a lost connection or a passing
    refusal (429, 503) is borne with.

    Raises:
        Misplaced: there is no key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        key: str | None = None,
        *,
        home: str | Path | None = None,
        patience: float = 15.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url = server_url(base_url, home)
        self._connection = Connection(url, server_key(key, home), patience=patience, transport=transport)
        self.base_url = url
        self.datasets = Datasets(self._connection)
        self.jobs = Jobs(self._connection)
        self.models = Models(self._connection)
        self.recipes = Recipes(self._connection)
        self.keys = Keys(self._connection)
        self.projects = Projects(self._connection)

    def me(self) -> Json:
        """Give the key's own project and scopes."""
        return self._connection.get("/v1/me")

    def workers(self) -> Page[Worker]:
        """Give the hosts that train."""
        return self._connection.get("/v1/workers")

    def ready(self) -> Json:
        """Give the server's own view of its health."""
        return self._connection.get("/readyz")

    def close(self) -> None:
        """Give the sockets back."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answers(base_url: str) -> bool:
    """Say whether a server is up at this address; needs no key."""
    try:
        return httpx.get(f"{base_url}/healthz", timeout=2, trust_env=False).is_success
    except httpx.TransportError:
        return False
