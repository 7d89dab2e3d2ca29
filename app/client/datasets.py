"""Datasets over the API."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.client.connection import Connection
from app.client.objects import Dataset, Page, Sample
from app.client.transfer import Advance, post_file
from app.client.waiting import each, until


class Datasets:
    """Upload, make, browse, wait for, delete."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(
        self,
        path: str | Path,
        name: str,
        *,
        task: str | None = None,
        on_error: str | None = None,
        metadata: dict[str, str] | None = None,
        advance: Advance | None = None,
    ) -> Dataset:
        """Stream an archive, or a folder as one tar, to the server; ingest goes on there, see `wait`."""
        fields: dict[str, Any] = {"name": name, "task": task, "on_error": on_error}
        fields["metadata"] = json.dumps(metadata) if metadata else None
        kept = {key: value for key, value in fields.items() if value is not None}
        return post_file(self._connection, "/v1/datasets", Path(path), kept, advance=advance)

    def create(
        self,
        name: str,
        *,
        builtin: str | None = None,
        upload: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Dataset:
        """Make a dataset from a standard set (`builtin="digits"`) or from a finished upload."""
        body = {"name": name, "builtin": builtin, "upload": upload, "metadata": metadata}
        return self._connection.post("/v1/datasets", {key: value for key, value in body.items() if value is not None})

    def get(self, dataset: str) -> Dataset:
        """Give one dataset."""
        return self._connection.get(f"/v1/datasets/{dataset}")

    def list(self, *, limit: int = 20, after: str | None = None, **filters: Any) -> Page[Dataset]:
        """Give one page, newest first; filters: `name`, `metadata`, `order`."""
        return self._connection.get("/v1/datasets", limit=limit, after=after, **filters)

    def each(self, **filters: Any) -> Iterator[Dataset]:
        """Give them all, page by page."""
        return each(self.list, **filters)

    def wait(
        self, dataset: str, *, timeout: float | None = None, on_change: Callable[[Dataset], None] | None = None
    ) -> Dataset:
        """Wait until ingest ended well or badly, and give the dataset as it is then."""
        return until(
            self._connection, f"/v1/datasets/{dataset}", lambda item: item["status"] != "processing",
            timeout=timeout, on_change=on_change,
        )  # fmt: skip

    def delete(self, dataset: str) -> dict[str, Any]:
        """Delete it; refused while a job needs it."""
        return self._connection.delete(f"/v1/datasets/{dataset}")

    def samples(self, dataset: str, *, limit: int = 100, after: str | None = None, **filters: Any) -> Page[Sample]:
        """Give one page of rows; filters: `split`, `label`."""
        return self._connection.get(f"/v1/datasets/{dataset}/samples", limit=limit, after=after, **filters)

    def image(self, dataset: str, number: int, *, size: str = "original") -> bytes:
        """Give the encoded bytes of one sample's image, or of its thumbnail."""
        path = f"/v1/datasets/{dataset}/samples/{number}/image"
        return self._connection.send("GET", path, params={"size": size}).content
