"""A small real dataset on disk, written as ingest writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.domain.datasets import DatasetFacts, Shard
from app.store import datasets, tables
from app.store.blobs import Blobs
from tests import factories

PICTURE = b"\x89PNG\r\n\x1a\n picture %d of %s"
THUMBNAIL = b"\xff\xd8\xff thumbnail %d of %s"


@dataclass(frozen=True)
class Made:
    """What ingest hands over."""

    facts: DatasetFacts
    format: str
    report: dict[str, Any]
    shards: tuple[Shard, ...]


def publish(
    engine: Engine, blobs: Blobs, session: Session, dataset: tables.Dataset, splits: Mapping[str, Sequence[int | None]]
) -> None:
    """Store shards of at most 4 rows with these labels (null is unlabelled) and make the dataset ready."""
    shards: list[Shard] = []
    for split, labels in splits.items():
        for index, begin in enumerate(range(0, len(labels), 4)):
            part = labels[begin : begin + 4]
            rows = [
                {
                    "image": {"bytes": PICTURE % (begin + i, split.encode()), "path": f"{split}/{begin + i}.png"},
                    "label": x,
                }
                for i, x in enumerate(part)
            ]
            images = _stream(pyarrow.Table.from_pylist(rows, schema=SCHEMA))
            small = _stream(
                pyarrow.table({"thumbnail": [THUMBNAIL % (begin + i, split.encode()) for i in range(len(part))]})
            )
            kept, kept_small = factories.make_blob(engine, blobs, images), factories.make_blob(engine, blobs, small)
            shards.append(
                Shard.model_validate(
                    {
                        "split": split, "index": index, "rows": len(part), "sha256": kept.sha256, "bytes": kept.bytes,
                        "thumbnails_sha256": kept_small.sha256, "thumbnails_bytes": kept_small.bytes,
                    }
                )
            )  # fmt: skip
    facts = DatasetFacts(
        id=dataset.id, sha256="a" * 64, task="image_classification", classes=("cat", "dog"),
        splits={split: len(labels) for split, labels in splits.items()},
        features={"image": "image", "label": "class"},
        labelled={split: sum(x is not None for x in labels) for split, labels in splits.items()},
        image_sizes={"min_height": 8, "max_height": 8, "min_width": 8, "max_width": 8}, channels=3,
        shards=tuple(shards),
    )  # fmt: skip
    datasets.publish(session, dataset.id, Made(facts, "image_folder", {"corrupt": []}, tuple(shards)))


SCHEMA = pyarrow.schema(
    [
        ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
        ("label", pyarrow.int64()),
    ]
)


def _stream(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()
