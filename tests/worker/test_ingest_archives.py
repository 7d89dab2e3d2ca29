"""Every honest dialect of zip and tar: streamed, shuffled, huge, old or without an end."""

import io
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from app.domain.errors import DataFault
from tests import pictures
from tests.pictures import Entry, jpeg, raw_tar, raw_zip, some, tar_entry
from tests.worker.ingested import jailed as ingest
from worker.ingest.zips import Zip

pytestmark = pytest.mark.worker

GOOD_TAR = tar_entry("cat/good.jpg", jpeg(1))


def test_an_entry_of_a_zip_is_found_wherever_it_lies(tmp_path: Path) -> None:
    files = some(*(f"{label}/{n:03d}.jpg" for label in "ab" for n in range(40)))
    shuffled = dict(sorted(files.items(), key=lambda item: zlib.crc32(item[0].encode())))
    one = ingest(pictures.zipped(tmp_path / "one", files), tmp_path)
    two = ingest(pictures.zipped(tmp_path / "two", shuffled, zipfile.ZIP_STORED), tmp_path)
    assert one.facts.sha256 == two.facts.sha256
    assert not one.report["bad"]["count"]


def test_streamed_zips_with_sizes_behind_the_data(tmp_path: Path) -> None:
    class Unseekable(io.RawIOBase):
        def __init__(self, path: Path) -> None:
            self.file = open(path, "wb")  # noqa: SIM115

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            return self.file.write(data)  # type: ignore[arg-type]

    stream = Unseekable(tmp_path / "upload")
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, data in some("a/1.jpg", "b/2.jpg").items():
            archive.writestr(name, data)
    stream.file.close()
    made = ingest(tmp_path / "upload", tmp_path)
    assert made.facts.splits == {"train": 2}
    assert not made.report["bad"]["count"]


def test_zip64_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "upload", "w") as archive, archive.open("a/1.jpg", "w", force_zip64=True) as file:
        file.write(jpeg())
    assert ingest(tmp_path / "upload", tmp_path).facts.splits == {"train": 1}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_dialect_of_tar_with_long_names(kind: int, mode: str, tmp_path: Path) -> None:
    names = [f"train/{'long' * 20}/{'name' * 15}-{n}.jpg" for n in range(3)]
    if kind != tarfile.USTAR_FORMAT:
        names.append(f"train/{'long' * 20}/{'sehr-länger-' * 15}.jpg")
    made = ingest(pictures.tarred(tmp_path / "upload", some(*names), mode, kind), tmp_path)
    assert made.facts.splits == {"train": len(names)}
    assert made.facts.classes == ("long" * 20,)


def test_a_tar_without_its_end_is_read_with_a_warning(tmp_path: Path) -> None:
    made = ingest(raw_tar(tmp_path / "upload", GOOD_TAR, end=b""), tmp_path)
    assert "no end mark" in made.report["warnings"][0]


def test_old_tars_without_a_magic_are_known_by_their_checksum(tmp_path: Path) -> None:
    old = tar_entry("cat/good.jpg", jpeg(1), magic=b"\0" * 8)
    assert ingest(raw_tar(tmp_path / "upload", old), tmp_path).facts.splits == {"train": 1}


def test_the_index_of_a_large_archive_needs_little_memory(tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "upload", [Entry(b"a folder of texts/%06d.txt" % n) for n in range(70_000)])
    limits = pictures.LIMITS.model_copy(update={"max_entries": 70_000})
    tracemalloc.start()
    try:
        archive = Zip(path, limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(archive.names) == 70_000
    archive.close()
    assert peak / 70_000 < 250, "two million entries must fit into half a gigabyte"


def test_an_archive_without_images_says_what_is_there(tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "upload", [Entry(b"notes/%02d.txt" % n, b"text") for n in range(20)])
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert caught.value.code == "no_images"
    assert "20 files (notes/00.txt, notes/01.txt, notes/02.txt, notes/03.txt, notes/04.txt, …)" in caught.value.message
    assert "class/image.jpg" in str(caught.value.hint)
