"""API keys over the API."""

from typing import Any

from app.client.connection import Connection
from app.client.objects import Json, Key, Page


class Keys:
    """Make, see and revoke keys; needs scope `admin`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, name: str, *, scopes: list[str], **fields: Any) -> Json:
        """Make a key; its secret stands in `key` of this answer and nowhere else."""
        given = {key: value for key, value in fields.items() if value is not None}
        return self._connection.post("/v1/keys", {"name": name, "scopes": scopes, **given})

    def list(self, *, limit: int = 20, after: str | None = None) -> Page[Key]:
        """Give one page, newest first."""
        return self._connection.get("/v1/keys", limit=limit, after=after)

    def revoke(self, key: str) -> Json:
        """End a key at once."""
        return self._connection.delete(f"/v1/keys/{key}")
