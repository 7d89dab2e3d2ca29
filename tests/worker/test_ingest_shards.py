"""What ingest hands over: shards that the Hub's library opens, thumbnails, facts, report, progress; always the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from app.domain.errors import DataFault, ResourceFault, UserFault
from tests import pictures
from tests.pictures import encoded, image, jpeg, png, some
from worker import ingest
from worker.ingest import Interrupted, dataset, ingest_folder, shards
from worker.parts.decode import decode
from worker.report import Event, MadeDataset, Message, Order, Progress, Reporter

pytestmark = pytest.mark.worker


def order(tmp_path: Path, upload: Path | None, **spec: Any) -> Order:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return Order(
        job="job_1", attempt=1, kind="internal", recipe="ingest", scratch=str(tmp_path / "scratch"),
        spec={"upload": "upl_1", "builtin": None, "on_error": "skip", "task": None, **spec},
        upload=str(upload) if upload else None, upload_name="set.zip", cache=str(tmp_path / "cache"), cache_bytes=2**30,
        threads=2, limits=pictures.LIMITS,
    )  # fmt: skip


def stream(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        return batches.read_all()


def run(path: Path, tmp_path: Path, **options: Any) -> MadeDataset:
    return ingest_folder(path, tmp_path / "scratch", limits=pictures.LIMITS, threads=2, **options)


def test_an_order_becomes_shards_below_scratch(tmp_path: Path) -> None:
    files = some("train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg")
    messages: list[Message] = []
    made = ingest.run(order(tmp_path, pictures.zipped(tmp_path / "up", files)), Reporter(listener=messages.append))
    assert [(shard.split, shard.index, shard.rows, shard.path) for shard in made.shards] == [
        ("train", 0, 2, "dataset/train-00000.arrow"), ("test", 0, 1, "dataset/test-00000.arrow"),
    ]  # fmt: skip
    scratch = tmp_path / "scratch"
    assert sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*")) == [
        "dataset", "dataset/test-00000.arrow", "dataset/train-00000.arrow",
    ]  # fmt: skip
    for shard in made.shards:
        data = (scratch / str(shard.path)).read_bytes()
        assert (shard.sha256, shard.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    whole = "".join(shard.sha256 for shard in made.shards)
    assert made.facts.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert made.facts.features == {"image": "image", "label": "class_label"}
    assert made.facts.labelled == {"train": 2, "test": 1}
    assert MadeDataset.model_validate_json(made.model_dump_json()) == made
    assert any(isinstance(message, Event) and message.code == "dataset_made" for message in messages)


def test_the_stream_has_the_schema_of_the_hub(tmp_path: Path) -> None:
    made = run(pictures.zipped(tmp_path / "up", some("zebra/1.jpg", "ant/2.jpg", "unlabeled/3.jpg")), tmp_path)
    path = Path(str(made.shards[0].path))
    found = stream(path)
    assert found.schema.remove_metadata() == pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    )
    assert json.loads(found.schema.metadata[b"huggingface"]) == {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": ["ant", "zebra"]},
            }
        }
    }
    assert found["label"].to_pylist() == [0, None, 1]
    assert path.read_bytes()[:4] == b"\xff\xff\xff\xff", "the stream format, not the file format"


def test_without_classes_the_label_is_a_plain_number(tmp_path: Path) -> None:
    made = run(pictures.zipped(tmp_path / "up", some("1.jpg", "2.jpg")), tmp_path)
    features = json.loads(stream(Path(str(made.shards[0].path))).schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"_type": "Value", "dtype": "int64"}
    assert made.facts.features == {"image": "image"}


def test_original_bytes_are_kept(tmp_path: Path) -> None:
    files = {"a/1.jpg": jpeg(1), "a/2.png": png(2, 300, 200), "b/3.gif": encoded(image(3), "GIF")}
    made = run(pictures.tarred(tmp_path / "up", files, "w:gz"), tmp_path)
    rows = stream(Path(str(made.shards[0].path)))["image"].to_pylist()
    assert {row["path"]: row["bytes"] for row in rows} == files


def test_thumbnails_lie_row_by_row_beside_their_images(tmp_path: Path) -> None:
    exif = pictures.Image.Exif()
    exif[0x0112] = 6
    sixteen = pictures.Image.fromarray(
        (np.arange(200 * 260, dtype=np.uint32) % 65536).astype(np.uint16).reshape(200, 260)
    )
    files = {
        "1.jpg": jpeg(1, 128, 90), "2.png": png(2, 300, 200), "3.png": png(3, 100, 900, "L"),
        "4.jpg": encoded(image(4, 400, 200), exif=exif), "5.png": encoded(sixteen, "PNG"), "6.png": png(6, 2000, 3),
    }  # fmt: skip
    made = run(pictures.zipped(tmp_path / "up", files), tmp_path)
    shard = made.shards[0]
    found = stream(Path(str(shard.thumbnails_path)))
    assert found.schema == pa.schema([("thumbnail", pa.binary())])
    pictures_found = found["thumbnail"].to_pylist()
    assert pictures_found[0] is None, "an image of at most 128 pixels is its own thumbnail"
    sizes = [tuple(decode(data).shape) for data in pictures_found[1:]]
    assert sizes == [(3, 85, 128), (1, 128, 14), (3, 128, 64), (1, 98, 128), (3, 1, 128)]
    data = Path(str(shard.thumbnails_path)).read_bytes()
    assert (shard.thumbnails_sha256, shard.thumbnails_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_thumbnail_looks_like_its_image(tmp_path: Path) -> None:
    smooth = pictures.Image.linear_gradient("L").resize((512, 256)).convert("RGB")
    made = run(pictures.zipped(tmp_path / "up", {"1.png": encoded(smooth, "PNG")}), tmp_path)
    small = decode(stream(Path(str(made.shards[0].thumbnails_path)))["thumbnail"][0].as_py()).float()
    expected = torch.from_numpy(np.asarray(smooth.resize((128, 64)), dtype=np.float32)).permute(2, 0, 1)
    assert (small - expected).abs().mean() < 3


def test_no_thumbnails_where_none_is_needed(tmp_path: Path) -> None:
    made = run(pictures.zipped(tmp_path / "up", some("1.jpg", "2.jpg")), tmp_path)
    assert made.shards[0].thumbnails_path is None
    assert not list((tmp_path / "scratch").rglob("*thumbnails*"))


def test_batches_and_shards_are_bounded(tmp_path: Path) -> None:
    made = run(pictures.zipped(tmp_path / "up", {f"{n:04d}.png": png(n % 50) for n in range(999)}), tmp_path)
    assert len(stream(Path(str(made.shards[0].path)))["image"].chunks) == 1
    writer = shards.ShardWriter(tmp_path, ("a",), shard_bytes=200_000)
    for first in range(0, 2500, 100):
        names = [f"{number}.jpg" for number in range(first, first + 100)]
        writer.add("train" if first < 2300 else "test", [b"x" * 150] * 100, names, [0] * 100, {})
    found = writer.close()
    assert [(shard.split, shard.index, shard.rows) for shard in found] == [
        ("train", 0, 1000), ("train", 1, 1000), ("train", 2, 300), ("test", 0, 200),
    ]  # fmt: skip
    assert max(shard.bytes for shard in found) < 220_000
    assert shards.names_of(found, {0, 1000, 2299, 2300}) == {
        0: "0.jpg", 1000: "1000.jpg", 2299: "2299.jpg", 2300: "2300.jpg"
    }  # fmt: skip
    big = shards.ShardWriter(tmp_path / "scratch", ())
    big.add("train", [b"x" * 20 * 2**20] * 5, list("abcde"), [None] * 5, {})
    (only,) = big.close()
    assert [len(chunk) for chunk in stream(Path(str(only.path)))["label"].chunks] == [2, 2, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_bad_neighbours_move_a_row(threads: int, tmp_path: Path) -> None:
    files = {f"{n % 3}/{n:04d}.jpg": jpeg(n % 97) for n in range(900)}
    limits = pictures.LIMITS.model_copy(update={"max_entries": 5000})
    plain = ingest_folder(pictures.zipped(tmp_path / "up", files), tmp_path / "one", limits=limits, threads=2)
    files |= {f"{n % 3}/{n:04d}x.jpg": b"no image" for n in range(0, 900, 7)}
    files["1/0500x.png"] = pictures.crashing_png()
    mixed = pictures.zipped(tmp_path / "mixed", files)
    made = ingest_folder(mixed, tmp_path / "two", limits=limits, threads=threads)
    assert made.facts.sha256 == plain.facts.sha256
    assert made.report["bad"]["count"] == 130


def test_thumbnails_follow_their_rows_over_batches(tmp_path: Path) -> None:
    writer = shards.ShardWriter(tmp_path, ())
    for first in range(0, 3000, 600):
        names = [str(number) for number in range(first, first + 600)]
        pictures_of = {at: names[at].encode() for at in range(0, 600, 7)}
        writer.add("train", [name.encode() for name in names], names, [None] * 600, pictures_of)
    (shard,) = writer.close()
    rows = stream(Path(str(shard.path)))["image"].to_pylist()
    assert [row["path"] for row in rows] == [row["bytes"].decode() for row in rows] == [str(n) for n in range(3000)]
    found = stream(Path(str(shard.thumbnails_path)))["thumbnail"].to_pylist()
    assert found == [str(n).encode() if n % 600 % 7 == 0 else None for n in range(3000)]


def test_a_lie_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    entries = [pictures.Entry(b"%05d.jpg" % n, jpeg(n % 9)) for n in range(2000)]
    entries[1900].local_name = b"other.jpg"
    limits = pictures.LIMITS.model_copy(update={"max_entries": 5000})
    with pytest.raises(DataFault, match="another name in its own header"):
        ingest_folder(pictures.raw_zip(tmp_path / "up", entries), tmp_path / "scratch", limits=limits, threads=2)
    assert not list((tmp_path / "scratch").iterdir())


def test_the_report_counts(tmp_path: Path) -> None:
    files = {f"train/a/{n}.jpg": jpeg(n, 20 + n, 30) for n in range(12)}
    files |= {"train/b/0.jpg": jpeg(0, 20, 30), "test/b/1.jpg": jpeg(1, 21, 30), "val/a/2.jpg": jpeg(99),
              "test/b/9.jpg": jpeg(1, 21, 30), "train/unlabeled/5.jpg": jpeg(77),
              "train/a/bad.jpg": b"bad"}  # fmt: skip
    report = run(pictures.zipped(tmp_path / "up", files), tmp_path).report
    assert report["splits"]["train"] == {
        "samples": 14, "labelled": 13, "unlabelled": 1, "classes": {"a": 12, "b": 1},
    }  # fmt: skip
    assert report["splits"]["test"]["classes"] == {"a": 0, "b": 2}
    assert report["samples"] == 17
    assert (report["sizes"]["min_width"], report["sizes"]["max_width"], report["sizes"]["max_height"]) == (12, 31, 30)
    assert report["sizes"]["most_common"][0] == [21, 30, 3]
    assert report["duplicates"] == {
        "rows": 3, "groups": 2, "conflicting_labels": 2,
        "examples": [
            [{"split": "train", "path": "train/a/0.jpg"}, {"split": "train", "path": "train/b/0.jpg"}],
            [{"split": "train", "path": "train/a/1.jpg"}, {"split": "test", "path": "test/b/1.jpg"}],
        ],
    }  # fmt: skip
    assert report["leakage"]["rows"] == 2
    assert report["leakage"]["by_split"] == {"test": 2}
    assert report["leakage"]["examples"] == [
        [{"split": "train", "path": "train/a/1.jpg"}, {"split": "test", "path": "test/b/1.jpg"}]
    ]
    assert report["imbalance"] == {
        "largest": {"class": "a", "samples": 12}, "smallest": {"class": "b", "samples": 1}, "ratio": 12.0,
    }  # fmt: skip
    assert report["bytes"] == sum(len(data) for data in files.values()) - 3
    for words in ("12 times the images", "2 images of another split", "different labels", "1 files were left out"):
        assert any(words in warning for warning in report["warnings"]), words
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("train/a/1.jpg", "train/a/2.jpg"), "one class only ('a')"),
        (("test/a/1.jpg", "test/b/2.jpg"), "no train split"),
        (("train/a/1.jpg", "test/b/2.jpg"), "no training image of 1 of 2 classes: b"),
    ],
)
def test_what_a_user_should_know_is_a_warning(files: tuple[str, ...], words: str, tmp_path: Path) -> None:
    messages: list[Message] = []
    made = run(pictures.zipped(tmp_path / "up", some(*files)), tmp_path, reporter=Reporter(listener=messages.append))
    assert any(words in warning for warning in made.report["warnings"])
    assert any(isinstance(event, Event) and words in event.message and event.level == "warning" for event in messages)


def test_bad_files_beyond_the_report_are_named_in_the_log(tmp_path: Path) -> None:
    messages: list[Message] = []
    files = {"good.jpg": jpeg()} | {f"{n:05d}.jpg": b"" for n in range(1500)}
    limits = pictures.LIMITS.model_copy(update={"max_entries": 5000})
    path = pictures.zipped(tmp_path / "up", files)
    made = ingest_folder(path, tmp_path / "s", limits=limits, reporter=Reporter(listener=messages.append))
    assert made.report["bad"]["count"] == 1500
    named = {item["name"] for item in made.report["bad"]["files"]}
    assert len(named) == 1000
    named |= {item["name"] for event in messages if isinstance(event, Event) for item in event.data.get("files", [])}
    assert named == files.keys() - {"good.jpg"}


def test_progress_grows_and_is_said_at_most_twice_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pictures.tarred(tmp_path / "up", {f"{n:04d}.jpg": jpeg(n) for n in range(900)}, "w:gz")
    said: list[Progress] = []
    reporter = Reporter(listener=lambda message: said.append(message) if isinstance(message, Progress) else None)
    run(path, tmp_path, reporter=reporter)
    assert len(said) <= 60, "the clock was ignored"
    monkeypatch.setattr(dataset, "_BETWEEN_REPORTS", 0.0)
    said.clear()
    run(path, tmp_path, reporter=reporter)
    fractions = [message.fraction for message in said]
    assert fractions == sorted(fractions)
    assert {message.phase for message in said} == {"unpack", "decode"}
    assert fractions[-1] == 1.0
    assert said[-1].samples_per_second


@pytest.mark.parametrize("wish", ["cancel", "drain", "pause", "stop"])
def test_another_wish_ends_it_at_once_and_leaves_nothing(wish: Any, tmp_path: Path) -> None:
    path = pictures.zipped(tmp_path / "up", {f"{n:04d}.jpg": jpeg(n) for n in range(900)})
    reporter = Reporter()
    reporter.want(wish)
    with pytest.raises(Interrupted) as caught:
        run(path, tmp_path, reporter=reporter)
    assert caught.value.wanted == wish
    assert not list((tmp_path / "scratch").iterdir())


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    run(pictures.zipped(tmp_path / "up", some("train/1.jpg", "test/2.jpg")), tmp_path)
    run(pictures.zipped(tmp_path / "up", some("1.jpg")), tmp_path)
    assert [path.name for path in (tmp_path / "scratch").rglob("*.arrow")] == ["train-00000.arrow"]


def test_a_full_disk_is_a_failure_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "add", full)
    with pytest.raises(ResourceFault) as caught:
        run(pictures.zipped(tmp_path / "up", some("1.jpg")), tmp_path)
    assert caught.value.code == "disk_full"
    assert not list((tmp_path / "scratch").iterdir())


def test_too_little_memory_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(shards.ShardWriter, "add", hungry)
    with pytest.raises(ResourceFault, match="more memory than is allowed"):
        run(pictures.zipped(tmp_path / "up", some("1.jpg")), tmp_path)


def test_an_order_with_neither_upload_nor_builtin(tmp_path: Path) -> None:
    with pytest.raises(UserFault):
        ingest.run(order(tmp_path, None), Reporter())


def test_the_order_says_what_becomes_of_bad_files(tmp_path: Path) -> None:
    path = pictures.zipped(tmp_path / "up", some("a/1.jpg") | {"a/2.jpg": b"no"})
    assert ingest.run(order(tmp_path, path), Reporter()).report["bad"]["count"] == 1
    with pytest.raises(DataFault, match=r"a/2\.jpg: not an image"):
        ingest.run(order(tmp_path, path, on_error="fail"), Reporter())


def test_a_builtin_set_by_order(tmp_path: Path) -> None:
    made = ingest.run(order(tmp_path, None, builtin="digits"), Reporter())
    assert made.facts.splits == {"train": 1297, "test": 500}
