"""Blobs on S3 or what speaks like it, through obstore: one object per digest under the prefix."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

from app.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Config

CHUNK = 2**20


class ObjectStore:
    """A bucket. A put is atomic and durable when it answers."""

    def __init__(self, store: S3Store) -> None:
        """Keep the bytes in this bucket, under the prefix it was opened with."""
        self._store = store

    def put(self, temporary: Path, sha256: str) -> None:
        """Upload the file, in parts when it is large; one that is already there is replaced."""
        obstore.put(self._store, sha256, temporary, use_multipart=True, chunk_size=16 * CHUNK, max_concurrency=4)

    def read(self, sha256: str, start: int, end: int) -> Iterator[bytes]:
        """Ask for the range and stream the answer."""
        answer = obstore.get(self._store, sha256, options={"range": (start, end)})
        for chunk in answer.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)

    def size(self, sha256: str) -> int | None:
        """Ask for the head of the object."""
        try:
            return obstore.head(self._store, sha256)["size"]
        except FileNotFoundError:
            return None

    def remove(self, sha256: str) -> None:
        """Delete the object; S3 does not mind if there is none."""
        obstore.delete(self._store, sha256)

    def path(self, sha256: str) -> None:  # noqa: ARG002
        """Say that the bytes are not on this machine."""
        return


def open_object_store(settings: Settings) -> ObjectStore:
    """Open `s3://bucket/prefix`; without keys in the settings, the machine's own role is used."""
    url = urlsplit(settings.blobs or "")
    if url.scheme != "s3" or not url.netloc:
        raise ValueError(f"TUNEYARD_BLOBS must look like s3://bucket/prefix, not {settings.blobs!r}")
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    endpoint = settings.s3_endpoint
    config: S3Config = {"region": settings.s3_region}
    if endpoint:
        config["endpoint"] = endpoint
    if key and secret:
        config["access_key_id"], config["secret_access_key"] = key.get_secret_value(), secret.get_secret_value()
    return ObjectStore(
        S3Store(
            url.netloc,
            prefix=url.path.strip("/") or None,
            config=config,
            client_options={"allow_http": bool(endpoint and endpoint.startswith("http://")), "timeout": "300s"},
        )
    )
