"""Archives that escape, link, explode, lie, nest or break: none gets out, each is named, the good rest is kept."""

import gzip
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.domain.errors import DataFault
from tests import pictures
from tests.pictures import Entry, jpeg, raw_tar, raw_zip, tar_entry
from tests.worker.ingested import jailed as ingest

pytestmark = pytest.mark.worker

GOOD = Entry(b"cat/good.jpg", jpeg(1))
GOOD_TAR = tar_entry("cat/good.jpg", jpeg(1))
ZEROS = b"\0" * (3 * 2**20)
ZIP64 = struct.pack("<HHQQQ", 1, 24, 2**63, 2**63, 0)


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records:
        line = f" {key}={value}\n".encode()
        size = len(line) + 1
        while len(str(size)) + len(line) != size:
            size += 1
        data += str(size).encode() + line
    return tar_entry("pax", data, kind)


def no_stream() -> Entry:
    entry = Entry(b"a.jpg", b"\xff" * 50, 8)
    entry.real = b"\xff" * 50
    return entry


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zip: parent folder": (lambda p: raw_zip(p, [GOOD, Entry(b"../evil.jpg", jpeg())]), "'../evil.jpg' points out"),
    "zip: parent within": (lambda p: raw_zip(p, [GOOD, Entry(b"a/../../evil.jpg", jpeg())]), "points out"),
    "zip: parent by backslash": (lambda p: raw_zip(p, [GOOD, Entry(b"..\\evil.jpg", jpeg())]), "points out"),
    "zip: parent as folder": (lambda p: raw_zip(p, [GOOD, Entry(b"../x/", mode=0o40755)]), "points out"),
    "zip: absolute": (lambda p: raw_zip(p, [GOOD, Entry(b"/etc/evil.jpg", jpeg())]), "absolute path"),
    "zip: drive": (lambda p: raw_zip(p, [GOOD, Entry(b"C:/evil.jpg", jpeg())]), "absolute path"),
    "zip: drive without slash": (lambda p: raw_zip(p, [GOOD, Entry(b"C:evil.jpg", jpeg())]), "absolute path"),
    "zip: network share": (lambda p: raw_zip(p, [GOOD, Entry(b"\\\\host\\evil.jpg", jpeg())]), "absolute path"),
    "zip: NUL": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg\0.txt", jpeg())]), "NUL"),
    "zip: device": (lambda p: raw_zip(p, [GOOD, Entry(b"null", mode=0o020666)]), "device"),
    "zip: pipe": (lambda p: raw_zip(p, [GOOD, Entry(b"pipe", mode=0o010666)]), "pipe"),
    "zip: link out": (lambda p: raw_zip(p, [GOOD, Entry(b"l", b"../../etc", mode=0o120777)]), "link to '../../etc'"),
    "zip: link to the root": (lambda p: raw_zip(p, [GOOD, Entry(b"l", b"/etc", mode=0o120777)]), "link to '/etc'"),
    "zip: packed link out": (lambda p: raw_zip(p, [GOOD, Entry(b"l", b"/etc", 8, mode=0o120777)]), "link to '/etc'"),
    "zip: bomb": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", ZEROS, 8)]), "times its size"),
    "zip: bomb of many": (
        lambda p: raw_zip(p, [Entry(b"%d.jpg" % n, b"\0" * 10**6, 8) for n in range(15)]), "times its size"),
    "zip: announces too much": (
        lambda p: raw_zip(p, [Entry(b"%d.jpg" % n, os.urandom(2**20) * 3, 8) for n in range(6)]), "unpacks to"),
    "zip: more than announced": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", ZEROS[:9000], 8, size=100)]), "more than the 100 bytes"),
    "zip: stored size lies": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), size=10)]), "announces 10 bytes"),
    "zip: local size lies": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), local_size=10)]), "another size in its own header"),
    "zip: local name lies": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), local_name=b"b.jpg")]), "another name in its own header"),
    "zip: local method lies": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), local_method=8)]), "packed in another way"),
    "zip: impossible size": (
        lambda p: raw_zip(p, [Entry(b"a.jpg", jpeg(), size=2**32 - 1, packed=2**32 - 1, extra=ZIP64)]), "impossible"),
    "zip: overlap, one file twice": (
        lambda p: raw_zip(p, [Entry(b"a.jpg", jpeg()), Entry(b"b.jpg", jpeg(), offset=0)]), "share bytes"),
    "zip: overlap, quoted (CVE-2024-0450)": (
        lambda p: raw_zip(p, [Entry(b"a.jpg", jpeg(), 8, packed=900), Entry(b"b.jpg", jpeg(2))]), "share bytes"),
    "zip: data in the directory": (
        lambda p: raw_zip(p, [Entry(b"a.jpg", jpeg(), packed=len(jpeg()) + 20, size=len(jpeg()) + 20)]), "share bytes"),
    "zip: offset behind the end": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), offset=10**6)]), "share bytes"),
    "zip: too many entries": (lambda p: raw_zip(p, [Entry(b"%d.jpg" % n) for n in range(1001)]), "1001 entries"),
    "tar: parent folder": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("../evil.jpg", jpeg())), "points out"),
    "tar: absolute": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("/etc/evil.jpg", jpeg())), "absolute path"),
    "tar: parent by pax": (
        lambda p: raw_tar(p, pax(("path", "../evil.jpg")), tar_entry("ok.jpg", jpeg())), "points out"),
    "tar: parent by long name": (
        lambda p: raw_tar(p, tar_entry("x", b"../evil.jpg\0", b"L"), tar_entry("ok.jpg", jpeg())), "points out"),
    "tar: link out (CVE-2025-4517)": (
        lambda p: raw_tar(p, GOOD_TAR, tar_entry("l", kind=b"2", link="../../etc")), "link to '../../etc'"),
    "tar: link to the root": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("l", kind=b"2", link="/etc")), "link to '/etc'"),
    "tar: hard link out": (
        lambda p: raw_tar(p, GOOD_TAR, tar_entry("l", kind=b"1", link="/etc/passwd")), "link to '/etc/passwd'"),
    "tar: link out by pax": (
        lambda p: raw_tar(p, pax(("linkpath", "/etc")), tar_entry("l", kind=b"2", link="here")), "link to '/etc'"),
    "tar: character device": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("null", kind=b"3")), "device"),
    "tar: block device": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("disk", kind=b"4")), "device"),
    "tar: pipe": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("pipe", kind=b"6")), "pipe"),
    "tar: negative size (CVE-2025-8194)": (
        lambda p: raw_tar(p, GOOD_TAR, tar_entry("a", size=b"\xff" * 12)), "impossible size"),
    "tar: size that is no number": (lambda p: raw_tar(p, tar_entry("a", size=b"12x")), "impossible size"),
    "tar: global names": (lambda p: raw_tar(p, pax(("path", "a"), kind=b"g"), GOOD_TAR), "one global header"),
    "tar: enormous header": (
        lambda p: raw_tar(p, tar_entry("x", b"", b"L", size=b"00100000000\0"), GOOD_TAR), "a header of"),
    "tar: too many entries": (lambda p: raw_tar(p, *[tar_entry(f"{n}.jpg") for n in range(1001)]), "1000 entries"),
    "tar.gz: bomb": (lambda p: pictures.gzipped(p, tar_entry("a.jpg", ZEROS) + b"\0" * 1024), "looks like a bomb"),
    "tar.gz: unpacks to too much": (
        lambda p: pictures.gzipped(p, tar_entry("a.jpg", os.urandom(17 * 2**20))), "unpacks to more than"),
    "gzip of a gzip of zeros": (
        lambda p: pictures.gzipped(p, b"\0" * 40 * 2**20), "looks like a bomb"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("on_error", ["skip", "fail"])
def test_a_hostile_archive_fails_as_a_whole(name: str, on_error: str, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    path = make(tmp_path / "upload")
    began = time.process_time()
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path, on_error=on_error)
    assert caught.value.code == "hostile_archive"
    assert words in caught.value.message
    assert caught.value.failure().retryable is False
    assert time.process_time() - began < 60  # whoever unpacked it would not be through
    assert [found.name for found in (tmp_path / "jail").iterdir()] == [], "something is half-visible"


NAMED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "zip: backslash": (lambda p: raw_zip(p, [GOOD, Entry(b"a\\b.jpg", jpeg())]), "a\\b.jpg", "a backslash"),
    "zip: long part": (lambda p: raw_zip(p, [GOOD, Entry(b"x" * 300 + b".jpg", jpeg())]), "xxx", "longer than"),
    "zip: deep": (lambda p: raw_zip(p, [GOOD, Entry(b"x/" * 40 + b"a.jpg", jpeg())]), "x/x/", "longer than"),
    "zip: empty part": (lambda p: raw_zip(p, [GOOD, Entry(b"a//b.jpg", jpeg())]), "a//b.jpg", "an empty part"),
    "zip: dot within": (lambda p: raw_zip(p, [GOOD, Entry(b"a/./b.jpg", jpeg())]), "a/./b.jpg", "an empty part"),
    "zip: control character": (lambda p: raw_zip(p, [GOOD, Entry(b"a\nb.jpg", jpeg())]), "a\\nb.jpg", "a control"),
    "zip: no text": (lambda p: raw_zip(p, [GOOD, Entry(b"\xff.jpg", jpeg(), flags=0x800)]), ".jpg", "not valid text"),
    "zip: twice": (lambda p: raw_zip(p, [GOOD, Entry(b"cat/good.jpg", jpeg(2))]), "cat/good.jpg", "occurs twice"),
    "zip: letter case": (lambda p: raw_zip(p, [GOOD, Entry(b"CAT/good.JPG", jpeg(2))]), "CAT/good.JPG", "twice"),
    "zip: link": (lambda p: raw_zip(p, [GOOD, Entry(b"l", b"cat", mode=0o120777)]), "l", "a link"),
    "zip: encrypted": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), flags=1)]), "a.jpg", "encrypted"),
    "zip: strange method": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), 14)]), "a.jpg", "method 14"),
    "zip: wrong checksum": (lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), checksum=1)]), "a.jpg", "checksum"),
    "zip: less than announced": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", jpeg(), 8, size=2000)]), "a.jpg", "2000 bytes are announced"),
    "zip: no deflate stream": (
        lambda p: raw_zip(p, [GOOD, no_stream()]),
        "a.jpg", "damaged in the zip"),
    "zip: file too large": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", os.urandom(5 * 2**20))]), "a.jpg", "a file may have"),
    "zip: nested": (
        lambda p: raw_zip(p, [GOOD, Entry(b"more.zip", raw_zip(p, [GOOD]).read_bytes())]), "more.zip", "unpack it"),
    "zip: nested with another name": (
        lambda p: raw_zip(p, [GOOD, Entry(b"more.bin", gzip.compress(b"x"))]), "more.bin", "unpack it first"),
    "zip: nested as an image": (
        lambda p: raw_zip(p, [GOOD, Entry(b"a.jpg", raw_zip(p, [GOOD]).read_bytes())]), "a.jpg", "not an image"),
    "tar: link": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("l", kind=b"2", link="cat")), "l", "a link"),
    "tar: hard link": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("l", kind=b"1", link="cat/good.jpg")), "l", "a link"),
    "tar: sparse": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("s.jpg", kind=b"S")), "s.jpg", "sparse"),
    "tar: sparse by pax": (
        lambda p: raw_tar(p, GOOD_TAR, pax(("GNU.sparse.major", "1")), tar_entry("s.jpg", b"x")), "s.jpg", "sparse"),
    "tar: unknown kind": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("x.jpg", kind=b"Z")), "x.jpg", "unknown kind"),
    "tar: backslash": (lambda p: raw_tar(p, GOOD_TAR, tar_entry("a\\b.jpg", jpeg())), "a\\b.jpg", "backslash"),
    "tar: twice": (lambda p: raw_tar(p, GOOD_TAR, GOOD_TAR), "cat/good.jpg", "occurs twice"),
    "tar: nested": (
        lambda p: raw_tar(p, GOOD_TAR, tar_entry("in.tar", GOOD_TAR + b"\0" * 1024)), "in.tar", "unpack it first"),
    "tar: file too large": (
        lambda p: raw_tar(p, GOOD_TAR, tar_entry("a.jpg", os.urandom(5 * 2**20))), "a.jpg", "a file may have"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_bad_entry_is_named_and_the_rest_is_kept(name: str, tmp_path: Path) -> None:
    make, entry, reason = NAMED[name]
    made = ingest(make(tmp_path / "upload"), tmp_path)
    assert made.facts.splits == {"train": 1}
    (bad,) = made.report["bad"]["files"]
    assert entry in bad["name"]
    assert reason in bad["reason"]
    assert made.report["bad"]["count"] == 1


@pytest.mark.parametrize("name", NAMED)
def test_a_bad_entry_fails_the_set_where_that_is_asked(name: str, tmp_path: Path) -> None:
    make, entry, reason = NAMED[name]
    with pytest.raises(DataFault) as caught:
        ingest(make(tmp_path / "upload"), tmp_path, on_error="fail")
    assert caught.value.code == "bad_files"
    assert entry in caught.value.message
    assert reason in caught.value.message


def split_zip(path: Path) -> Path:
    return raw_zip(path, [GOOD], disk=1)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def cut(path: Path, bytes_left: int) -> Path:
    path.write_bytes(path.read_bytes()[:bytes_left])
    return path


DAMAGED: dict[str, Callable[[Path], Path]] = {
    "zip: cut in the middle": lambda p: cut(raw_zip(p, [GOOD, Entry(b"b.jpg", jpeg(2))]), 600),
    "zip: cut in the directory": lambda p: cut(raw_zip(p, [GOOD]), raw_zip(p, [GOOD]).stat().st_size - 30),
    "zip: fewer entries than said": lambda p: raw_zip(p, [GOOD], count=2),
    "zip: more entries than said": lambda p: raw_zip(p, [GOOD, Entry(b"b.jpg", jpeg(2))], count=1),
    "zip: directory elsewhere": lambda p: raw_zip(p, [GOOD], start=7),
    "zip: one of several": split_zip,
    "zip: something before it": lambda p: written(p, b"PK\3\4" + raw_zip(p, [GOOD]).read_bytes()),
    "zip: sizes of zip64 missing": lambda p: raw_zip(p, [Entry(b"a.jpg", jpeg(), size=2**32 - 1, extra=b"\1\0\0\0")]),
    "tar: cut in a file": lambda p: cut(raw_tar(p, GOOD_TAR, tar_entry("b.jpg", jpeg(2))), 1600),
    "tar: garbage between": lambda p: raw_tar(p, GOOD_TAR, b"garbage" * 100),
    "tar: cut behind a long name": lambda p: raw_tar(p, GOOD_TAR, tar_entry("x", b"a" * 200, b"L"), end=b""),
    "tar: damaged pax": lambda p: raw_tar(p, tar_entry("x", b"99999999 a=b\n", b"x"), GOOD_TAR),
    "tar: pax without a sign": lambda p: raw_tar(p, tar_entry("x", b"6 abc\n", b"x"), GOOD_TAR),
    "tar.gz: cut": lambda p: cut(pictures.gzipped(p, GOOD_TAR + os.urandom(9000)), 5000),
    "tar.gz: damaged": lambda p: written(p, gzip.compress(GOOD_TAR)[:-6] + b"\0" * 6),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_archive_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataFault) as caught:
        ingest(DAMAGED[name](tmp_path / "upload"), tmp_path)
    assert caught.value.code == "damaged_archive"
    assert caught.value.hint
