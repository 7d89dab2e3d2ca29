"""Parquet: read right, and refused with the place and the correction."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.domain.errors import DataFault
from tests import pictures
from tests.pictures import jpeg
from tests.worker.ingested import ingest, table

pytestmark = pytest.mark.worker


def parquet(
    images: Sequence[bytes | None],
    labels: list[Any] | None,
    *,
    classes: list[str] | None = None,
    column: str = "image",
    paths: list[str | None] | None = None,
) -> bytes:
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = paths or [f"{n}.jpg" for n in range(len(images))]
    rows = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    columns: dict[str, pa.Array] = {column: pa.array(rows, struct_type)}
    features: dict[str, Any] = {column: {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
        if classes:
            features["label"] = {"_type": "ClassLabel", "names": classes}
    found = pa.table(columns)
    if classes:
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    pq.write_table(found, sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def test_parquet_in_the_hubs_layout(tmp_path: Path) -> None:
    images = [jpeg(n) for n in range(20)]
    classes = ["zebra", "ant"]
    files = {
        "data/train-00001-of-00002.parquet": parquet(images[5:12], [1, 0, 1, -1, 0, 1, 0], classes=classes),
        "data/train-00000-of-00002.parquet": parquet(images[:5], [0, 1, 0, 1, None], classes=classes),
        "data/test-00000-of-00001.parquet": parquet(images[12:], [0, 1] * 4, classes=classes),
        "README.md": b"# a data card",
    }
    made = ingest(pictures.zipped(tmp_path / "upload", files), tmp_path)
    assert (made.format, made.facts.classes) == ("parquet", ("zebra", "ant"))
    assert made.facts.splits == {"train": 12, "test": 8}
    assert made.facts.labelled == {"train": 10, "test": 8}
    train = table(made, "train")
    assert [row["bytes"] for row in train["image"].to_pylist()] == images[:12]
    assert train["label"].to_pylist() == [0, 1, 0, 1, None, 1, 0, 1, None, 0, 1, 0]
    assert train["image"][0]["path"].as_py() == "0.jpg"


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (None, (), [None, None, None]),
        ([2, 0, 2], ("0", "1", "2"), [2, 0, 2]),
        ([7, -3, 7], ("-3", "7"), [1, 0, 1]),
        (["dog", "cat", None], ("cat", "dog"), [1, 0, None]),
        ([1.5, 2.5, 3.5], (), [None, None, None]),
    ],
)
def test_a_single_parquet_file_without_metadata(
    labels: list[Any] | None, classes: tuple[str, ...], expected: list[int | None], tmp_path: Path
) -> None:
    path = tmp_path / "upload"
    path.write_bytes(parquet([jpeg(n) for n in range(3)], labels, column="picture"))
    made = ingest(path, tmp_path)
    assert made.facts.classes == classes
    assert table(made, "train")["label"].to_pylist() == expected


def test_bad_rows_of_parquet_are_named(tmp_path: Path) -> None:
    images = [jpeg(0), None, b"no", jpeg(3), pictures.crashing_png()]
    path = tmp_path / "upload"
    path.write_bytes(parquet(images, [0, 0, 0, 9, 0], classes=["a"], paths=["0.jpg", None, "2.jpg", "3.jpg", "4.png"]))
    made = ingest(path, tmp_path)
    assert made.facts.splits == {"train": 1}
    assert [(bad["name"], bad["reason"].split(";")[0]) for bad in made.report["bad"]["files"]] == [
        ("upload: row 1", "the row holds no bytes"),
        ("2.jpg", "not an image"),
        ("3.jpg", "label '9', but there are 1 classes"),
        ("4.png", "damaged: the decoder crashed on it"),
    ]


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (lambda: pq_bytes({"text": ["a"], "label": [1]}), "no_images", "no column of images; it has text: string"),
        (lambda: parquet([jpeg()], [0])[:-40], "damaged_archive", "damaged Parquet file"),
        (lambda: b"PAR1" + b"\0" * 100 + b"PAR1", "damaged_archive", "damaged Parquet file"),
        (lambda: b"PAR1" + b"\xff\xff\xff\x7fPAR1", "damaged_archive", "damaged Parquet file"),
        (lambda: parquet([], []), "no_usable_images", "none of the 0 images"),
    ],
)  # fmt: skip
def test_parquet_that_does_not_fit(data: Any, code: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(data())
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert caught.value.code == code
    assert words in caught.value.message


def pq_bytes(columns: dict[str, list[Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_parquet_files_must_agree_on_the_classes(tmp_path: Path) -> None:
    files = {
        "train.parquet": parquet([jpeg()], [0], classes=["a", "b"]),
        "test.parquet": parquet([jpeg()], [0], classes=["b", "a"]),
    }
    with pytest.raises(DataFault, match="name different classes"):
        ingest(pictures.zipped(tmp_path / "upload", files), tmp_path)


def test_parquet_with_flipped_bytes_never_does_worse_than_fail(tmp_path: Path) -> None:
    whole = parquet([jpeg(n) for n in range(30)], [n % 3 for n in range(30)], classes=["a", "b", "c"])
    draw = np.random.default_rng(0)
    path = tmp_path / "upload"
    kept = failed = 0
    for _ in range(40):
        broken = bytearray(whole)
        for at in draw.integers(4, len(whole) - 8, 3):
            broken[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(broken)
        try:
            made = ingest(path, tmp_path)
        except DataFault:
            failed += 1
        else:
            kept += 1
            assert made.report["samples"] + made.report["bad"]["count"] == 30
    assert kept
    assert failed
