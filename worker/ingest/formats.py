"""What an upload is, told by its first bytes; the file's name never decides."""

from collections.abc import Callable
from pathlib import Path

from app.domain.errors import DataFault
from worker.ingest import cifar, folder, idx, parquet
from worker.ingest.archive import Archive, Problem, shown
from worker.ingest.directories import Directory
from worker.ingest.rows import Source, nothing_found
from worker.ingest.tars import BLOCK, Tar, gunzip, is_header
from worker.ingest.zips import Zip
from worker.parts import decode
from worker.report import Limits

HINT = (
    "expected a zip, tar or tar.gz of an image folder, the CIFAR python tar, MNIST idx files, "
    "or Parquet in the Hub's image layout"
)
_PROBES = 300  # files without an image's name that are looked into before a format is settled
_OTHERS = (
    (b"BZh", "a bzip2 file; repack it as tar.gz or zip"),
    (b"\xfd7zXZ\0", "an xz file; repack it as tar.gz or zip"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file; repack it as tar.gz or zip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; repack it as zip"),
    (b"Rar!\x1a\7", "a rar archive; repack it as zip"),
    (b"PK\7\x08", "one part of a split zip; join the parts"),
    (b"ARROW1", "an Arrow file; write it as Parquet"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x80", "a pickle; upload the whole cifar-10-python.tar.gz"),
    (b"%PDF", "a PDF"),
)


def read(
    path: Path, name: str, scratch: Path, asked: str | None, limits: Limits, tick: Callable[[float], None]
) -> Source:
    """Recognise an upload, or a folder on this machine, and read its index. Raises `DataFault`."""
    if path.is_dir():
        return _archive(Directory(path, limits), "folder", scratch, asked, limits)
    with open(path, "rb") as file:
        head = file.read(BLOCK)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _archive(Zip(path, limits), "zip", scratch, asked, limits)
    what = "tar"
    if head.startswith(b"\x1f\x8b"):
        plain, what = scratch / "unpacked", "tar.gz"
        gunzip(path, plain, limits, tick)
        path = plain
        with open(path, "rb") as file:
            head = file.read(BLOCK)
    if is_header(head):
        return _archive(Tar(path, limits), what, scratch, asked, limits)
    if idx.recognise(head):
        return idx.read_file(path, name)
    if parquet.recognise(head) and what == "tar":
        return parquet.read_files([(path, name)], limits)
    raise DataFault(
        f"{shown(name)} is {_guess(head)}" + (" in a gzip file" if what == "tar.gz" else ""),
        code="unknown_format", phase="read", hint=HINT,
    )  # fmt: skip


def _archive(archive: Archive, what: str, scratch: Path, asked: str | None, limits: Limits) -> Source:
    """Choose by what lies in it: images make a folder, else the first special kind of file that is found."""
    try:
        kinds = _probe(archive)
        if "parquet" in kinds:
            source = parquet.read_archive(archive, kinds["parquet"], scratch, limits)
        elif "cifar" in kinds:
            source = cifar.read(archive, kinds["cifar"], scratch)
        elif "idx" in kinds:
            source = idx.read_archive(archive, kinds["idx"], scratch, limits)
        elif not archive.names and archive.refused:
            raise DataFault(
                f"no file in the {what} can be used: {_listed(archive.refused)}", code="no_images", phase="read",
                hint=HINT,
            )  # fmt: skip
        elif not archive.names:
            raise nothing_found(what, ())
        else:
            source = folder.read(archive, what, asked)
            source.close = archive.close
    except BaseException:
        archive.close()
        raise
    if source.format != "image_folder":
        archive.close()  # what is needed lies unpacked in scratch
    source.problems = archive.refused + source.problems
    source.warnings = archive.warnings + source.warnings
    return source


def _listed(problems: list[Problem]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in problems[:5])


def _probe(archive: Archive) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    left = _PROBES
    for number, name in enumerate(archive.names):
        if folder.is_junk(name):
            continue
        if folder.is_image_name(name):
            return {}
        if left > 0 or kinds:
            left -= 1
            head = archive.head(number, 64)
            if parquet.recognise(head):
                kinds.setdefault("parquet", []).append(number)
            elif idx.recognise(head) or (head.startswith(b"\x1f\x8b") and "idx" in name.lower()):
                kinds.setdefault("idx", []).append(number)
            elif cifar.recognise(head):
                kinds.setdefault("cifar", []).append(number)
    return kinds


def _guess(head: bytes) -> str:
    if not head:
        return "empty"
    image = decode.sniff(head)
    if image:
        return f"a single {image} image; pack a folder of images into a zip or tar"
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return what
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return f"text, beginning with {shown(head[:40].decode('utf-8', 'replace'))!r}"
    return f"of no known format (first bytes {head[:8].hex(' ')})"
