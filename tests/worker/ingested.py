"""What ingest made of an upload: its rows and its pixels."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from tests import pictures
from worker.ingest import ingest_folder
from worker.parts.decode import decode
from worker.report import Limits, MadeDataset

ROOMY = Limits(max_entries=1000, max_entry_bytes=2**26, max_unpacked_bytes=2**27, max_ratio=1000, max_pixels=1_000_000)


def ingest(path: Path, tmp_path: Path, **options: object) -> MadeDataset:
    """Ingest an upload with limits that nothing here meets."""
    return ingest_folder(path, tmp_path / "scratch", limits=ROOMY, threads=1, **options)  # type: ignore[arg-type]


def jailed(path: Path, tmp_path: Path, **options: object) -> MadeDataset:
    """Ingest into a scratch folder that lies alone in `tmp_path/jail`, and see that nothing else was written."""
    before = set(tmp_path.rglob("*"))
    jail = tmp_path / "jail"
    try:
        return ingest_folder(path, jail, limits=pictures.LIMITS, threads=1, **options)  # type: ignore[arg-type]
    finally:
        outside = {found for found in tmp_path.rglob("*") if jail not in (found, *found.parents)} - before
        assert not outside, "something was written outside of scratch"
        assert not [found for found in jail.rglob("*") if found.is_symlink()]


def table(made: MadeDataset, split: str) -> pa.Table:
    """Read all rows of a split."""
    parts = []
    for shard in made.shards:
        if shard.split == split and shard.path:
            with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
                parts.append(stream.read_all())
    return pa.concat_tables(parts)


def pixels_of(made: MadeDataset, split: str) -> np.ndarray:
    """Decode all images of a split: uint8 [n, channels, height, width]."""
    return np.stack([decode(row["bytes"]).numpy() for row in table(made, split)["image"].to_pylist()])
