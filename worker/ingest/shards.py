"""The canonical form of a dataset: Arrow IPC streams that the Hub's library opens, with thumbnails beside them.

Nothing in a shard depends on the machine, the time or the order in which threads finished, so equal rows give equal
digests.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from app.domain.datasets import Shard, Split
from worker.ingest.archive import Bytes

BATCH_ROWS = 1000
BATCH_BYTES = 32 * 2**20
SHARD_BYTES = 256 * 2**20
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_THUMBNAILS = pa.schema([("thumbnail", pa.binary())])


def schema(classes: tuple[str, ...]) -> pa.Schema:
    """Give the schema of image shards, with the metadata from which the Hub's library takes the feature types."""
    label: dict[str, Any] = {"names": list(classes), "_type": "ClassLabel"} if classes else {
        "dtype": "int64", "_type": "Value"
    }  # fmt: skip
    features = {"image": {"_type": "Image"}, "label": label}
    return pa.schema(
        [("image", _IMAGE), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}}, ensure_ascii=False, sort_keys=True)},
    )


class _Stream:
    """An Arrow IPC stream that takes its digest as it grows: encapsulated messages one after another."""

    def __init__(self, path: Path, kind: pa.Schema) -> None:
        self.path, self.digest, self.bytes = path, hashlib.sha256(), 0
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115  (closed by close)
        self.write(kind.serialize())

    def write(self, message: pa.Buffer | bytes) -> None:
        """Append one message."""
        self.digest.update(message)
        self.bytes += len(message)
        self._file.write(message)

    def close(self) -> None:
        """Write the end mark and close the file."""
        self.write(b"\xff\xff\xff\xff\0\0\0\0")
        self._file.close()


def _binary(pieces: Sequence[Bytes]) -> pa.Array:
    """Make a binary array with one copy; `pa.array` takes eight times as long over memory views."""
    offsets = np.zeros(len(pieces) + 1, np.int32)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(pieces))]
    return pa.Array.from_buffers(pa.binary(), len(pieces), buffers)


class ShardWriter:
    """Writes rows, split after split, into shards of bounded size; memory holds at most one batch."""

    def __init__(self, folder: Path, classes: tuple[str, ...], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.shards: list[Shard] = []
        self._folder, self._schema, self._shard_bytes = folder, schema(classes), shard_bytes
        self._split: Split | None = None
        self._streams: list[_Stream] = []
        self._rows, self._any_thumbnail = 0, False
        self._clear()

    def add(
        self,
        split: Split,
        data: Sequence[Bytes],
        names: Sequence[str],
        labels: Sequence[int | None],
        thumbnails: Mapping[int, bytes],
    ) -> None:
        """Append rows, with thumbnails by the number of their row; the splits must come one after another."""
        if split != self._split:
            self._flush()
            self._finish()
            self._split = split
        start, end = 0, 0
        while start < len(data):
            room, held = BATCH_ROWS - len(self._data), self._bytes
            while end < len(data) and end - start < room and held < BATCH_BYTES:
                held += len(data[end])
                end += 1
            self._data += data[start:end]
            self._names += names[start:end]
            self._labels += labels[start:end]
            self._thumbnails += [thumbnails.get(at) for at in range(start, end)]
            self._bytes, start = held, end
            if len(self._data) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
                self._flush()

    def abandon(self) -> None:
        """Close the files of a run that failed."""
        for stream in self._streams:
            stream.close()
        self._streams = []

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard; gives all of them, in order."""
        self._flush()
        self._finish()
        return tuple(self.shards)

    def _clear(self) -> None:
        self._data: list[Bytes] = []
        self._names: list[str] = []
        self._labels: list[int | None] = []
        self._thumbnails: list[bytes | None] = []
        self._bytes = 0

    def _flush(self) -> None:
        if not self._data:
            return
        if self._streams and self._streams[0].bytes + self._bytes > self._shard_bytes:
            self._finish()
        if not self._streams:
            self._open()
        image = pa.StructArray.from_arrays(
            [_binary(self._data), pa.array(self._names, pa.string())], fields=list(_IMAGE)
        )
        labels = pa.array(self._labels, pa.int64())
        self._streams[0].write(pa.record_batch([image, labels], schema=self._schema).serialize())
        thumbnails = pa.array(self._thumbnails, pa.binary())
        self._streams[1].write(pa.record_batch([thumbnails], schema=_THUMBNAILS).serialize())
        self._rows += len(self._data)
        self._any_thumbnail |= any(thumbnail is not None for thumbnail in self._thumbnails)
        self._clear()

    def _open(self) -> None:
        index = sum(shard.split == self._split for shard in self.shards)
        for suffix, kind in ((".arrow", self._schema), (".thumbnails.arrow", _THUMBNAILS)):
            self._streams.append(_Stream(self._folder / f"{self._split}-{index:05d}{suffix}", kind))
        self._rows, self._any_thumbnail = 0, False

    def _finish(self) -> None:
        if not self._streams:
            return
        for stream in self._streams:
            stream.close()
        rows, thumbnails = self._streams
        self._streams = []
        if not self._any_thumbnail:
            thumbnails.path.unlink()  # every image is small enough to be its own
        assert self._split is not None
        self.shards.append(
            Shard(
                split=self._split, index=sum(shard.split == self._split for shard in self.shards), rows=self._rows,
                sha256=rows.digest.hexdigest(), bytes=rows.bytes, path=str(rows.path),
                thumbnails_sha256=thumbnails.digest.hexdigest() if self._any_thumbnail else None,
                thumbnails_bytes=thumbnails.bytes if self._any_thumbnail else 0,
                thumbnails_path=str(thumbnails.path) if self._any_thumbnail else None,
            )
        )  # fmt: skip


def names_of(shards: Sequence[Shard], rows: set[int]) -> dict[int, str]:
    """Read the names of some rows, numbered over all shards, back from the files."""
    found: dict[int, str] = {}
    first = 0
    for shard in shards:
        wanted = {row for row in rows if first <= row < first + shard.rows}
        if wanted and shard.path:
            with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
                at = first
                for batch in stream:
                    names = batch.column("image").field("path")
                    found |= {row: names[row - at].as_py() for row in wanted if at <= row < at + len(names)}
                    at += len(names)
        first += shard.rows
    return found
