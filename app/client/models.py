"""Models over the API."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.client.connection import Connection
from app.client.objects import File, Json, Model, Page
from app.client.transfer import Advance, fetch_file, post_file
from app.client.waiting import each, until


class Models:
    """Trained artefacts: find, change what may be changed, download, import."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, model: str) -> Model:
        """Give one model."""
        return self._connection.get(f"/v1/models/{model}")

    def list(self, *, limit: int = 20, after: str | None = None, **filters: Any) -> Page[Model]:
        """Give one page, newest first; filters: `name`, `task`, `visibility`, `order`."""
        return self._connection.get("/v1/models", limit=limit, after=after, **filters)

    def each(self, **filters: Any) -> Iterator[Model]:
        """Give them all, page by page."""
        return each(self.list, **filters)

    def update(self, model: str, **changes: Any) -> Model:
        """Change `name`, `visibility`, `tags` or `description`."""
        return self._connection.patch(f"/v1/models/{model}", changes)

    def delete(self, model: str) -> Json:
        """Delete it; its lineage stays known."""
        return self._connection.delete(f"/v1/models/{model}")

    def files(self, model: str) -> Sequence[File]:
        """Give its files."""
        return self._connection.get(f"/v1/models/{model}/files")["data"]

    def fetch(self, model: str, file: File, folder: str | Path, *, advance: Advance | None = None) -> Path:
        """Download one file and verify its digest; a call that was cut off is gone on with."""
        path = f"/v1/models/{model}/files/{file['name']}"
        return fetch_file(self._connection, path, file, Path(folder), advance=advance)

    def download(self, model: str, folder: str | Path) -> Sequence[Path]:
        """Download all its files."""
        return [self.fetch(model, file, folder) for file in self.files(model)]

    def import_(
        self,
        path: str | Path,
        name: str,
        *,
        architecture: Json | str,
        classes: Sequence[str] | None = None,
        advance: Advance | None = None,
        **fields: Any,
    ) -> Model:
        """Bring in a safetensors file; it is checked against the architecture by a job, see `wait`.

        Further fields: `head`, `channels`, `mean`, `std`, `interpolation`, `tags`, `description`.
        """
        asked = {"name": name, "architecture": architecture, "classes": classes, **fields}
        given = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in asked.items()
            if value is not None
        }
        return post_file(self._connection, "/v1/models", Path(path), given, advance=advance)

    def wait(self, model: str, *, timeout: float | None = None) -> Model:
        """Wait until an import ended well or badly, and give the model as it is then."""
        return until(
            self._connection, f"/v1/models/{model}", lambda item: item["status"] != "processing", timeout=timeout
        )
