"""Image folders: which splits and classes a layout comes to, what is ignored, what is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from app.domain.errors import DataFault, UserFault
from tests import pictures
from tests.pictures import jpeg, png, some
from worker.ingest import ingest_folder
from worker.report import MadeDataset

pytestmark = pytest.mark.worker

Rows = list[tuple[str, str, int | None]]


def ingest(path: Path, tmp_path: Path, **options: object) -> MadeDataset:
    return ingest_folder(path, tmp_path / "scratch", limits=pictures.LIMITS, threads=1, **options)  # type: ignore[arg-type]


def rows(made: MadeDataset) -> Rows:
    found: Rows = []
    for shard in made.shards:
        assert shard.path
        with pa.memory_map(shard.path) as file, pa.ipc.open_stream(file) as stream:
            for row in stream.read_all().to_pylist():
                found.append((shard.split, row["image"]["path"], row["label"]))
    return found


LAYOUTS: dict[str, tuple[Mapping[str, bytes], tuple[str, ...], Rows]] = {
    "classes": (some("b/1.jpg", "a/2.jpg", "a/1.jpg"), ("a", "b"),
                [("train", "a/1.jpg", 0), ("train", "a/2.jpg", 0), ("train", "b/1.jpg", 1)]),
    "plain sorting of names": (some("10/a.jpg", "2/a.jpg", "B/a.jpg", "a/a.jpg"), ("10", "2", "B", "a"),
                               [("train", "10/a.jpg", 0), ("train", "2/a.jpg", 1), ("train", "B/a.jpg", 2),
                                ("train", "a/a.jpg", 3)]),
    "flat": (some("2.jpg", "1.jpg"), (), [("train", "1.jpg", None), ("train", "2.jpg", None)]),
    "flat in one folder": (some("photos/2.jpg", "photos/1.jpg"), (),
                           [("train", "photos/1.jpg", None), ("train", "photos/2.jpg", None)]),
    "splits": (some("test/a/1.jpg", "train/b/1.jpg", "train/a/2.jpg", "validation/a/3.jpg"), ("a", "b"),
               [("train", "train/a/2.jpg", 0), ("train", "train/b/1.jpg", 1), ("validation", "validation/a/3.jpg", 0),
                ("test", "test/a/1.jpg", 0)]),
    "splits in any letter case": (some("Train/a/1.jpg", "TEST/a/2.jpg", "Val/b/3.jpg"), ("a", "b"),
                                  [("train", "Train/a/1.jpg", 0), ("validation", "Val/b/3.jpg", 1),
                                   ("test", "TEST/a/2.jpg", 0)]),
    "wrapped": (some("set/train/a/1.jpg", "set/test/a/2.jpg"), ("a",),
                [("train", "set/train/a/1.jpg", 0), ("test", "set/test/a/2.jpg", 0)]),
    "wrapped twice": (some("set/v1/train/a/1.jpg", "set/v1/val/a/2.jpg"), ("a",),
                      [("train", "set/v1/train/a/1.jpg", 0), ("validation", "set/v1/val/a/2.jpg", 0)]),
    "wrapped classes": (some("set/a/1.jpg", "set/b/1.jpg"), ("a", "b"), [("train", "set/a/1.jpg", 0),
                                                                         ("train", "set/b/1.jpg", 1)]),
    "wrapped, one class": (some("set/a/1.jpg", "set/a/2.jpg"), ("a",), [("train", "set/a/1.jpg", 0),
                                                                       ("train", "set/a/2.jpg", 0)]),
    "splits without classes": (some("train/1.jpg", "test/2.jpg"), (),
                               [("train", "train/1.jpg", None), ("test", "test/2.jpg", None)]),
    "only a train split": (some("train/1.jpg", "train/2.jpg"), (),
                           [("train", "train/1.jpg", None), ("train", "train/2.jpg", None)]),
    "some without labels": (some("a/1.jpg", "b/1.jpg", "unlabeled/x/1.jpg", "Unlabelled/2.jpg", "3.jpg"), ("a", "b"),
                            [("train", "3.jpg", None), ("train", "Unlabelled/2.jpg", None), ("train", "a/1.jpg", 0),
                             ("train", "b/1.jpg", 1), ("train", "unlabeled/x/1.jpg", None)]),
    "unlabelled beside splits": (some("train/a/1.jpg", "test/a/2.jpg", "unlabeled/3.jpg"), ("a",),
                                 [("train", "train/a/1.jpg", 0), ("train", "unlabeled/3.jpg", None),
                                  ("test", "test/a/2.jpg", 0)]),
    "unlabelled in a split": (some("train/a/1.jpg", "train/unlabelled/2.jpg", "test/a/3.jpg"), ("a",),
                              [("train", "train/a/1.jpg", 0), ("train", "train/unlabelled/2.jpg", None),
                               ("test", "test/a/3.jpg", 0)]),
    "a class called test": (some("test/1.jpg", "exam/1.jpg", "quiz/1.jpg"), ("exam", "quiz", "test"),
                            [("train", "exam/1.jpg", 0), ("train", "quiz/1.jpg", 1), ("train", "test/1.jpg", 2)]),
    "deeper folders belong to their class": (some("a/x/1.jpg", "b/y/z/2.jpg"), ("a", "b"),
                                             [("train", "a/x/1.jpg", 0), ("train", "b/y/z/2.jpg", 1)]),
    "accents in either form": (some("train/cafe\u0301/1.jpg", "test/caf\xe9/2.jpg"), ("caf\xe9",),
                               [("train", "train/caf\xe9/1.jpg", 0), ("test", "test/caf\xe9/2.jpg", 0)]),
    "names that say nothing": ({"a/one": jpeg(1), "b/two.dat": png(2)}, ("a", "b"),
                               [("train", "a/one", 0), ("train", "b/two.dat", 1)]),
    "names that lie": ({"a/one.png": jpeg(1), "b/two.jpg": png(2)}, ("a", "b"),
                       [("train", "a/one.png", 0), ("train", "b/two.jpg", 1)]),
    "what systems leave behind": (
        some("a/1.jpg", "b/1.jpg") | {"__MACOSX/a/._1.jpg": b"junk", "a/.DS_Store": b"j", "b/Thumbs.db": b"j",
                                      "b/._1.jpg": b"junk", "desktop.ini": b"j"},
        ("a", "b"), [("train", "a/1.jpg", 0), ("train", "b/1.jpg", 1)]),
}  # fmt: skip
PACKERS: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {
    "zip": pictures.zipped,
    "tar": pictures.tarred,
    "tar.gz": lambda path, files: pictures.tarred(path, files, "w:gz"),
    "folder": pictures.foldered,
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_comes_to_these_rows(name: str, packer: str, tmp_path: Path) -> None:
    files, classes, expected = LAYOUTS[name]
    made = ingest(PACKERS[packer](tmp_path / "upload.bin", files), tmp_path)
    assert made.facts.classes == classes
    assert rows(made) == expected
    assert made.format == "image_folder"
    assert made.facts.task == ("image_classification" if classes else "unlabelled_images")
    assert made.report["bad"]["count"] == 0
    assert made.report["ignored"]["count"] == 0


def test_one_upload_gives_one_digest_however_it_is_packed(tmp_path: Path) -> None:
    files = LAYOUTS["splits"][0]
    made = {ingest(pack(tmp_path / name, files), tmp_path).facts.sha256 for name, pack in PACKERS.items()}
    assert len(made) == 1
    backwards = dict(reversed(list(files.items())))
    assert ingest(pictures.tarred(tmp_path / "again", backwards), tmp_path).facts.sha256 in made
    other = {**files, "train/a/2.jpg": jpeg(99)}
    assert ingest(pictures.tarred(tmp_path / "other", other), tmp_path).facts.sha256 not in made


def test_one_folder_is_a_class_where_classes_are_asked(tmp_path: Path) -> None:
    path = pictures.zipped(tmp_path / "upload", some("cats/1.jpg", "cats/2.jpg"))
    made = ingest(path, tmp_path, task="image_classification")
    assert made.facts.classes == ("cats",)
    assert any("one class only ('cats')" in warning for warning in made.report["warnings"])
    plain = ingest(path, tmp_path)
    assert plain.facts.classes == ()
    assert any("in the one folder 'cats'" in warning for warning in plain.report["warnings"])


def test_classes_are_dropped_where_no_labels_are_asked(tmp_path: Path) -> None:
    made = ingest(pictures.zipped(tmp_path / "upload", LAYOUTS["splits"][0]), tmp_path, task="unlabelled_images")
    assert made.facts.task == "unlabelled_images"
    assert made.facts.labelled == {"train": 0, "validation": 0, "test": 0}
    assert {label for _, _, label in rows(made)} == {None}


def test_labels_that_are_asked_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataFault) as caught:
        ingest(pictures.zipped(tmp_path / "upload", some("1.jpg", "2.jpg")), tmp_path, task="image_classification")
    assert caught.value.code == "no_labels"


def test_what_is_left_out_has_a_name(tmp_path: Path) -> None:
    files = some("train/a/1.jpg", "test/a/2.jpg", "docs/picture.jpg", "cover.jpg", "train/.hidden/3.jpg")
    files |= {"README.md": b"# hello", "train/labels.csv": b"a,b"}
    made = ingest(pictures.zipped(tmp_path / "upload", files), tmp_path, on_error="fail")
    ignored = {item["name"]: item["reason"] for item in made.report["ignored"]["files"]}
    assert ignored == {
        "README.md": "not an image",
        "train/labels.csv": "not an image",
        "train/.hidden/3.jpg": "hidden",
        "docs/picture.jpg": "lies beside the folders train, validation and test",
        "cover.jpg": "lies beside the folders train, validation and test",
    }
    assert made.facts.splits == {"train": 1, "test": 1}


def test_links_in_a_folder_are_named_and_not_followed(tmp_path: Path) -> None:
    folder = pictures.foldered(tmp_path / "set", some("a/1.jpg", "b/1.jpg"))
    (folder / "a" / "2.jpg").symlink_to(folder / "b" / "1.jpg")
    (folder / "c").symlink_to("/", target_is_directory=True)
    made = ingest(folder, tmp_path)
    assert made.facts.splits == {"train": 2}
    assert [(item["name"], item["reason"][:6]) for item in made.report["bad"]["files"]] == [
        ("a/2.jpg", "a link"), ("c", "a link"),
    ]  # fmt: skip


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserFault) as caught:
        ingest(tmp_path / "nowhere", tmp_path)
    assert "nowhere" in caught.value.message


@pytest.mark.parametrize("packer", PACKERS)
def test_an_empty_set(packer: str, tmp_path: Path) -> None:
    path = PACKERS[packer](tmp_path / "upload", {})
    path.mkdir(exist_ok=True) if packer == "folder" else None
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert caught.value.code in ("no_images", "unknown_format")
    assert caught.value.hint


OTHERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "one image": (jpeg(), "a single jpeg image"),
    "a bitmap": (pictures.encoded(pictures.image(), "BMP"), "a single BMP image"),
    "text": (b"name,label\ncat,1\n", "text, beginning with 'name,label"),
    "json": (b'[{"a": 1}]', "JSON"),
    "bzip2": (b"BZh91AY", "a bzip2 file; repack it"),
    "xz": (b"\xfd7zXZ\0\0", "an xz file; repack it"),
    "rar": (b"Rar!\x1a\7\0", "a rar archive"),
    "a pickle": (b"\x80\x02}q\x01.", "a pickle"),
    "zeros": (b"\0" * 1024, "of no known format (first bytes 00 00"),
    "a web page": (b"<html>not found</html>", "text, beginning with '<html>"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_unknown_format_says_what_was_found_and_what_is_expected(name: str, tmp_path: Path) -> None:
    data, words = OTHERS[name]
    path = tmp_path / "upload.zip"
    path.write_bytes(data)
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert caught.value.code == "unknown_format"
    assert words in caught.value.message
    assert "expected a zip, tar or tar.gz" in str(caught.value.hint)
