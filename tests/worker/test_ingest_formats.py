"""CIFAR pickles, MNIST idx, Parquet and builtin sets: read right, and refused with the place and the correction."""

import builtins
import gzip
import hashlib
import io
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision import datasets

from app.domain.errors import DataFault, UserFault
from tests import pictures
from tests.pictures import jpeg, png
from worker.ingest import builtin, ingest_builtin, ingest_folder, pickles
from worker.parts.decode import decode
from worker.report import Limits, MadeDataset

pytestmark = pytest.mark.worker

ROOMY = Limits(max_entries=1000, max_entry_bytes=2**26, max_unpacked_bytes=2**27, max_ratio=1000, max_pixels=1_000_000)


def ingest(path: Path, tmp_path: Path, **options: object) -> MadeDataset:
    return ingest_folder(path, tmp_path / "scratch", limits=ROOMY, threads=1, **options)  # type: ignore[arg-type]


def table(made: MadeDataset, split: str) -> pa.Table:
    parts = []
    for shard in made.shards:
        if shard.split == split and shard.path:
            with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
                parts.append(stream.read_all())
    return pa.concat_tables(parts)


def pixels_of(made: MadeDataset, split: str) -> np.ndarray:
    return np.stack([decode(row["bytes"]).numpy() for row in table(made, split)["image"].to_pylist()])


# --- CIFAR -----------------------------------------------------------------------------------------------------------


class Python2:
    """Write pickles with the instructions that Python 2's cPickle wrote the CIFAR files with."""

    def __init__(self) -> None:
        self.out, self.memo = io.BytesIO(), 0

    def put(self) -> None:
        self.out.write(b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo))
        self.memo += 1

    def value(self, item: Any) -> None:
        if isinstance(item, dict):
            self.out.write(b"}")
            self.put()
            self.out.write(b"(")
            for key, part in item.items():
                self.value(key)
                self.value(part)
            self.out.write(b"u")
        elif isinstance(item, list):
            self.out.write(b"]")
            self.put()
            self.out.write(b"(")
            for part in item:
                self.value(part)
            self.out.write(b"e")
        elif isinstance(item, int):
            self.out.write(b"K" + bytes([item]) if 0 <= item < 256 else b"J" + struct.pack("<i", item))
        elif isinstance(item, str):
            data = item.encode()
            self.out.write(b"U" + bytes([len(data)]) + data)
            self.put()
        else:
            self.array(item)

    def array(self, array: np.ndarray, dtype: bytes = b"u1") -> None:
        rows, columns = array.shape
        self.out.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.put()
        self.out.write(b"cnumpy\nndarray\n")
        self.put()
        self.out.write(b"K\x00\x85U\x01b\x87R")
        self.put()
        self.out.write(b"(K\x01" + b"J" + struct.pack("<i", rows) + b"M" + struct.pack("<H", columns) + b"\x86")
        self.out.write(b"cnumpy\ndtype\nU\x02" + dtype + b"K\x00K\x01\x87R")
        self.out.write(b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        raw = array.tobytes()
        self.out.write(b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb")

    @classmethod
    def dumps(cls, item: Any) -> bytes:
        writer = cls()
        writer.out.write(b"\x80\x02")
        writer.value(item)
        writer.out.write(b".")
        return writer.out.getvalue()


def batch(
    seed: int, rows: int, label: str, key: str = "labels", classes: int = 10
) -> tuple[np.ndarray, dict[str, Any]]:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (rows, 3072), dtype=np.uint8)
    content = {
        "batch_label": label, key: draw.integers(0, classes, rows).tolist(), "data": pixels,
        "filenames": [f"thing_{seed}_{n:04d}.png" for n in range(rows)],
    }  # fmt: skip
    return pixels.reshape(-1, 3, 32, 32), content


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(path: Path, **changed: bytes) -> tuple[Path, np.ndarray, np.ndarray, list[int]]:
    parts = [batch(n, 20, f"training batch {n} of 2") for n in (1, 2)]
    test = batch(9, 10, "testing batch 1 of 1")
    files = {
        "cifar-10-batches-py/batches.meta": Python2.dumps({"num_cases_per_batch": 20, "label_names": NAMES}),
        "cifar-10-batches-py/data_batch_2": Python2.dumps(parts[1][1]),
        "cifar-10-batches-py/data_batch_1": Python2.dumps(parts[0][1]),
        "cifar-10-batches-py/test_batch": Python2.dumps(test[1]),
        "cifar-10-batches-py/readme.html": b"<html>",
    }
    files |= {f"cifar-10-batches-py/{name}": data for name, data in changed.items()}
    labels = parts[0][1]["labels"] + parts[1][1]["labels"]
    return pictures.tarred(path, files, "w:gz"), np.concatenate([parts[0][0], parts[1][0]]), test[0], labels


def test_cifar10_as_its_authors_publish_it(tmp_path: Path) -> None:
    path, train, test, labels = cifar10(tmp_path / "upload.bin")
    made = ingest(path, tmp_path)
    assert (made.format, made.facts.classes) == ("cifar", tuple(NAMES))
    assert made.facts.splits == {"train": 40, "test": 10}
    assert table(made, "train")["label"].to_pylist() == labels
    assert np.array_equal(pixels_of(made, "train"), train)
    assert np.array_equal(pixels_of(made, "test"), test)
    assert table(made, "train")["image"][0]["path"].as_py() == "train/thing_1_0000.png"
    assert ingest(path, tmp_path).facts.sha256 == made.facts.sha256


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    pixels, train = batch(1, 12, "training batch 1 of 1", "fine_labels", 100)
    _, test = batch(2, 6, "testing batch 1 of 1", "fine_labels", 100)
    train["coarse_labels"] = test["coarse_labels"] = [0] * 12
    names = [f"thing {n}" for n in range(100)]
    meta = {"fine_label_names": names, "coarse_label_names": ["all"]}
    files = {"c/train": Python2.dumps(train), "c/test": Python2.dumps(test), "c/meta": Python2.dumps(meta)}
    made = ingest(pictures.tarred(tmp_path / "upload", files), tmp_path)
    assert made.facts.classes == tuple(names)
    assert table(made, "train")["label"].to_pylist() == train["fine_labels"]
    assert np.array_equal(pixels_of(made, "train"), pixels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_a_pickle_written_again_by_python_3(protocol: int, keys: Any, tmp_path: Path) -> None:
    pixels, content = batch(1, 8, "training batch 1 of 1")
    content = {keys(key): value for key, value in content.items()}
    files = {"c/data_batch_1": pickle.dumps(content, protocol)}
    made = ingest(pictures.zipped(tmp_path / "upload", files), tmp_path)
    assert np.array_equal(pixels_of(made, "train"), pixels)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def evil_pickles(canary: Path) -> dict[str, bytes]:
    import os
    import subprocess

    touch = f"touch {canary}"
    state = b"(K\x01K\x04K\x04\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    array = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    good = Python2.dumps(batch(1, 2, "training batch 1 of 1")[1])
    return {
        "os.system": pickle.dumps({"data": Evil(os.system, touch)}, 2),
        "os.system, protocol 0": b"}(S'data'\ncos\nsystem\n(S'" + touch.encode() + b"'\ntRs.",
        "os.system, protocol 4": pickle.dumps({"data": Evil(os.system, touch)}, 4),
        "eval": pickle.dumps({"data": Evil(builtins.eval, f"open({str(canary)!r}, 'w')")}, 2),
        "exec": pickle.dumps({"data": Evil(builtins.exec, f"open({str(canary)!r}, 'w')")}, 2),
        "getattr": pickle.dumps({"data": Evil(getattr, 1, "real")}, 2),
        "Popen": pickle.dumps({"data": Evil(subprocess.Popen, ["touch", str(canary)])}, 2),
        "a class": b"\x80\x02}U\x04data(ios\nsystem\nU\x01x.",
        "an object": b"\x80\x02}U\x04datacos\nsystem\n)\x81s.",
        "an extension": b"\x80\x02}U\x04data\x82\x01s.",
        "a persistent id": b"\x80\x02}U\x04dataU\x01xQs.",
        "numpy's own loader": b"\x80\x02}U\x04datacnumpy\nload\nU\x01x\x85Rs.",
        "a codec that is no text": b"\x80\x02}U\x04datac_codecs\nencode\nX\x01\x00\x00\x00xU\x06base64\x86Rs.",
        "bytes of a number": b"\x80\x02}U\x04datac__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85Rs.",
        "numpy's constructor of something else": b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)Rs.",
        "calling a number": b"\x80\x02}U\x04dataK\x01)Rs.",
        "calling a string": b"\x80\x02}U\x04dataU\x09os.system)Rs.",
        "state on a dictionary": b"\x80\x02}}b.",
        "an array of objects": array + state.replace(b"u1", b"O8") + b"\x89U\x04abcdtbs.",
        "an array of another size": array + state + b"\x89U\x04abcdtbs.",
        "an array without state": array + b"s.",
        "a negative shape": array + state.replace(b"K\x04K\x04", b"J\xff\xff\xff\xffK\x04") + b"\x89U\x04abcdtbs.",
        "an enormous shape": array + state.replace(b"K\x04K\x04", b"J\xff\xff\xff\x7f" * 2) + b"\x89U\x00tbs.",
        "a string longer than the file": b"\x80\x02}U\x04dataT\xff\xff\xff\x7fabcs.",
        "a string of negative length": b"\x80\x02}U\x04dataT\xff\xff\xff\xffabcs.",
        "cut short": good[:-200],
        "no stop": good[:-1],
        "only a head": b"\x80\x02}",
        "a list": b"\x80\x02}0](K\x01e.",
        "an empty stack": b"\x80\x02}0.",
        "an unknown memo": b"\x80\x02}h\x09.",
        "a missing mark": b"\x80\x02}K\x01u.",
        "odd items": b"\x80\x02}(K\x01u.",
        "a key that is a list": b"\x80\x02}]K\x01s.",
        "a key that is no text": b"\x80\x02}(U\x01\xffK\x01u.",
    }  # fmt: skip


@pytest.mark.parametrize("name", evil_pickles(Path("canary")))
def test_a_pickle_that_is_more_than_data_is_refused_and_never_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = evil_pickles(canary)[name]
    with pytest.raises(DataFault) as caught:
        pickles.load(memoryview(data), "data_batch_1")
    assert caught.value.code == "unsafe_pickle"
    assert "data_batch_1 is not a pickle as the CIFAR files have it" in caught.value.message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "called"),
    [("os.system", "posix.system"), ("os.system, protocol 4", "posix.system"), ("eval", "__builtin__.eval"),
     ("Popen", "commands.Popen"), ("numpy's own loader", "numpy.load")],
)  # fmt: skip
def test_the_refusal_says_which_code_was_called_for(name: str, called: str) -> None:
    with pytest.raises(DataFault, match=f"it calls for '{called}', which is code"):
        pickles.load(memoryview(evil_pickles(Path("canary"))[name]), "data_batch_1")


@pytest.mark.parametrize("name", ["os.system", "eval", "cut short", "an array of objects"])
def test_an_archive_with_such_a_pickle_fails_by_name(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path, *_ = cifar10(tmp_path / "upload", data_batch_2=evil_pickles(canary)[name])
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert caught.value.code == "unsafe_pickle"
    assert "cifar-10-batches-py/data_batch_2" in caught.value.message
    assert not canary.exists()


def test_the_reader_never_runs_long(tmp_path: Path) -> None:
    deep = b"\x80\x02}" + b"(" * 100_000 + b"t" * 100_000 + b"."
    with pytest.raises(DataFault):
        pickles.load(memoryview(deep), "deep")
    doubling = b"\x80\x02]q\x00" + b"(h\x00h\x00eq\x00" * 50_000 + b"."
    with pytest.raises(DataFault, match="no dictionary"):
        pickles.load(memoryview(doubling), "doubling")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [0]}, "20 images, but not as many labels"),
        ({"labels": [300] * 20}, "row 0 has a label that is no class number"),
        ({"data": np.zeros((20, 3000), np.uint8)}, "no uint8 array of 3072 values"),
    ],
)
def test_a_cifar_batch_that_does_not_fit_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = batch(2, 20, "training batch 2 of 2")[1] | change
    path, *_ = cifar10(tmp_path / "upload", data_batch_2=Python2.dumps(content))
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert "data_batch_2" in caught.value.message
    assert words in caught.value.message


# --- idx -------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(rows: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "train-images-idx3-ubyte": draw.integers(0, 256, (rows, 9, 7), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(rows) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (rows // 2, 9, 7), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(rows // 2) % 10).astype(np.uint8),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("packer", [pictures.zipped, pictures.tarred, pictures.foldered])
def test_mnist_in_an_archive(packer: Any, packed: bool, tmp_path: Path) -> None:
    arrays = mnist()
    files = {
        f"MNIST/raw/{name}{'.gz' if packed else ''}": gzip.compress(idx(array)) if packed else idx(array)
        for name, array in arrays.items()
    }
    made = ingest(packer(tmp_path / "upload", files), tmp_path)
    assert (made.format, made.facts.channels) == ("idx", 1)
    assert made.facts.classes == tuple("0123456789")
    assert made.facts.splits == {"train": 30, "test": 15}
    assert np.array_equal(pixels_of(made, "train")[:, 0], arrays["train-images-idx3-ubyte"])
    assert table(made, "test")["label"].to_pylist() == arrays["t10k-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_a_single_idx_file_is_unlabelled(packed: bool, tmp_path: Path) -> None:
    images = mnist()["train-images-idx3-ubyte"]
    path = tmp_path / "upload"
    path.write_bytes(gzip.compress(idx(images)) if packed else idx(images))
    made = ingest(path, tmp_path)
    assert (made.facts.task, made.facts.splits) == ("unlabelled_images", {"train": 30})
    assert np.array_equal(pixels_of(made, "train")[:, 0], images)


def test_two_idx_files_of_any_name_belong_together(tmp_path: Path) -> None:
    arrays = mnist()
    files = {"x.idx": idx(arrays["train-images-idx3-ubyte"]), "y.idx": idx(arrays["train-labels-idx1-ubyte"])}
    assert ingest(pictures.zipped(tmp_path / "upload", files), tmp_path).facts.labelled == {"train": 30}


BAD_IDX: dict[str, tuple[dict[str, bytes], str, str]] = {
    "other counts": ({"train-images-idx3-ubyte": idx(np.zeros((3, 2, 2), np.uint8)),
                      "train-labels-idx1-ubyte": idx(np.zeros(2, np.uint8))}, "invalid_data", "3 images and "),
    "labels only": ({"train-labels-idx1-ubyte": idx(np.zeros(2, np.uint8))}, "no_images", "only labels"),
    "cut": ({"train-images-idx3-ubyte": idx(np.zeros((3, 2, 2), np.uint8))[:-1]}, "damaged_archive",
            "announces 3 x 2 x 2 values and holds 11 bytes"),
    "enormous": ({"train-images-idx3-ubyte": b"\0\0\x08\x03" + b"\xff" * 12}, "damaged_archive",
                 "announces 4294967295"),
    "no pixels": ({"train-images-idx3-ubyte": idx(np.zeros((3, 0, 2), np.uint8))}, "invalid_data", "without pixels"),
    "two dimensions": ({"train-images-idx2-ubyte": idx(np.zeros((3, 2), np.uint8))}, "invalid_data", "2 dimensions"),
    "a bomb": ({"train-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x08\x03" + b"\0" * 2**27)}, "hostile_archive",
               "bomb"),
    "cut gzip": ({"train-images-idx3-ubyte.gz": gzip.compress(idx(mnist()["train-images-idx3-ubyte"]))[:-300]},
                 "damaged_archive", "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IDX)
def test_idx_files_that_do_not_fit(name: str, tmp_path: Path) -> None:
    files, code, words = BAD_IDX[name]
    with pytest.raises(DataFault) as caught:
        ingest(pictures.tarred(tmp_path / "upload", files), tmp_path)
    assert caught.value.code == code
    assert words in caught.value.message


# --- Parquet ---------------------------------------------------------------------------------------------------------


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
    made = ingest_folder(path, tmp_path / "scratch", limits=ROOMY)
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
            made = ingest_folder(path, tmp_path / "scratch", limits=ROOMY, threads=1)
        except DataFault:
            failed += 1
        else:
            kept += 1
            assert made.report["samples"] + made.report["bad"]["count"] == 30
    assert kept
    assert failed


# --- builtin ---------------------------------------------------------------------------------------------------------


def test_digits_are_the_same_everywhere(tmp_path: Path) -> None:
    made = ingest_builtin("digits", tmp_path / "scratch", tmp_path / "cache")
    assert made.facts.splits == {"train": 1297, "test": 500}
    assert made.facts.classes == tuple("0123456789")
    assert made.facts.image_sizes == {"min_height": 8, "max_height": 8, "min_width": 8, "max_width": 8}
    assert (made.format, made.facts.channels, made.facts.task) == ("builtin:digits", 1, "image_classification")
    counts = made.report["splits"]["test"]["classes"].values()
    assert sum(counts) == 500
    assert min(counts) >= 46
    assert made.report["leakage"]["rows"] == 0
    pixels, labels, test = builtin.digits()
    assert np.array_equal(pixels_of(made, "test")[:, 0], pixels[test])
    assert table(made, "train")["label"].to_pylist() == labels[~test].tolist()
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.flatnonzero(test).tolist() == list(range(1297, 1797)), "the split of published results must not move"


def test_a_builtin_set_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserFault) as caught:
        ingest_builtin("cifar_10", tmp_path / "scratch", tmp_path / "cache")
    assert "did you mean cifar10" in str(caught.value.hint)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserFault) as caught:
        ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache")
    assert caught.value.code == "builtin_unavailable"
    assert "http://127.0.0.1:9/cifar.tar.gz" in caught.value.message
    assert "upload it as a dataset" in str(caught.value.hint)
    assert caught.value.failure().retryable is False
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def served(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> None:
    """Let downloads come from files, by the end of their address."""

    def download(url: str, to: Path, tick: Any) -> None:
        to.write_bytes(files[url.rsplit("/", 1)[-1]].read_bytes())
        tick(1.0)

    monkeypatch.setattr(builtin, "_download", download)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_fetched_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, train, _, _ = cifar10(tmp_path / "cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://nowhere/cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(path))
    served(monkeypatch, {"cifar.tar.gz": path})
    made = ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache")
    assert made.format == "builtin:cifar10"
    assert np.array_equal(pixels_of(made, "train"), train)
    served(monkeypatch, {})
    assert ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache").facts.sha256 == made.facts.sha256
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    served(monkeypatch, {"cifar.tar.gz": path})
    with pytest.raises(UserFault, match="not the expected bytes"):
        ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache")


@pytest.mark.parametrize(("name", "kind"), [("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)])
def test_mnist_and_its_like(name: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = mnist()
    files = {f"{stem}.gz": pictures.gzipped(tmp_path / f"{stem}.gz", idx(array)) for stem, array in arrays.items()}
    monkeypatch.setattr(kind, "resources", [(file, md5(path)) for file, path in files.items()])
    served(monkeypatch, files)
    made = ingest_builtin(name, tmp_path / "scratch", tmp_path / "cache")
    assert made.facts.splits == {"train": 30, "test": 15}
    assert made.facts.classes[9] == ("9" if name == "mnist" else "Ankle boot")


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    draw = np.random.default_rng(0)
    splits: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    train = draw.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    for split, pixels in (("train", train), ("test", train[..., :3])):
        path = files[f"{split}.mat"] = tmp_path / f"{split}.mat"
        savemat(path, {"X": pixels, "y": np.array([[1], [10], [3], [4], [5], [6]][: pixels.shape[3]])})
        splits[split] = [f"http://nowhere/{split}.mat", f"{split}.mat", md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    served(monkeypatch, files)
    made = ingest_builtin("svhn", tmp_path / "scratch", tmp_path / "cache")
    assert table(made, "train")["label"].to_pylist() == [1, 0, 3, 4, 5, 6]
    assert np.array_equal(pixels_of(made, "train"), train.transpose(3, 2, 0, 1))
    assert made.report["leakage"]["rows"] == 3


def test_stl10_has_unlabelled_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    parts = {stem: draw.integers(0, 256, (rows, 3, 96, 96), dtype=np.uint8)
             for stem, rows in (("train", 4), ("test", 3), ("unlabeled", 5))}  # fmt: skip
    files = {f"stl10_binary/{stem}_X.bin": pixels.tobytes() for stem, pixels in parts.items()}
    files |= {"stl10_binary/train_y.bin": bytes([1, 10, 2, 3]), "stl10_binary/test_y.bin": bytes([4, 5, 6])}
    path = pictures.tarred(tmp_path / "stl10.tar.gz", files, "w:gz")
    monkeypatch.setattr(datasets.STL10, "url", "http://nowhere/stl10.tar.gz")
    monkeypatch.setattr(datasets.STL10, "tgz_md5", md5(path))
    served(monkeypatch, {"stl10.tar.gz": path})
    made = ingest_builtin("stl10", tmp_path / "scratch", tmp_path / "cache")
    assert table(made, "train")["label"].to_pylist() == [0, 9, 1, 2, None, None, None, None, None]
    assert np.array_equal(pixels_of(made, "test"), parts["test"].transpose(0, 1, 3, 2))
    assert made.facts.labelled == {"train": 4, "test": 3}


def test_builtin_pictures_are_png(tmp_path: Path) -> None:
    made = ingest_builtin("digits", tmp_path / "scratch", tmp_path / "cache")
    first = table(made, "train")["image"][0].as_py()
    assert first["bytes"].startswith(png()[:8])
    assert first["path"] == "train/0/0000.png"
