"""A zip that is made while it is sent."""

import io
import zipfile
from collections.abc import Iterator

import pytest

from app.http import zips

pytestmark = pytest.mark.unit
MADE_AT = 1_800_000_000.0


def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    yield from (data[start : start + size] for start in range(0, len(data), size))


def test_what_is_put_in_comes_out() -> None:
    contents = {"a.txt": b"hello", "empty": b"", "w.safetensors": bytes(range(256)) * 100}
    made = b"".join(zips.stream(((name, len(data), chunks(data)) for name, data in contents.items()), made_at=MADE_AT))
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == contents
        assert archive.infolist()[0].date_time == (2027, 1, 15, 8, 0, 0)
        assert archive.infolist()[0].external_attr >> 16 == 0o644


def test_the_same_files_give_the_same_bytes() -> None:
    def make() -> bytes:
        return b"".join(zips.stream([("a", 3, iter([b"abc"]))], made_at=MADE_AT))

    assert make() == make()
    assert b"".join(zips.stream([("a", 3, iter([b"abc"]))], made_at=0.0)) != make()  # before 1980, where zip begins


def test_memory_stays_small_whatever_the_size() -> None:
    asked = 0

    def endless() -> Iterator[bytes]:
        nonlocal asked
        for _ in range(200):
            asked += 1
            yield bytes(100_000)

    largest, sent = 0, 0
    for piece in zips.stream([("big", 20_000_000, endless())], made_at=MADE_AT):
        largest, sent = max(largest, len(piece)), sent + len(piece)
        assert sent >= (asked - 1) * 100_000  # nothing is read before what went ahead of it was given away
    assert sent > 20_000_000
    assert largest < 150_000


def test_entries_beyond_two_gigabytes_are_announced_as_such() -> None:
    made = b"".join(zips.stream([("big", 2**31, iter([b"x"]))], made_at=MADE_AT))
    assert made[4:6] == (45).to_bytes(2, "little")  # version needed: 4.5, ZIP64


def test_an_entry_that_breaks_off_leaves_no_whole_zip() -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise OSError("the disk is gone")

    pieces = zips.stream([("a", 100, broken())], made_at=MADE_AT)
    sent = next(pieces)
    with pytest.raises(OSError, match="the disk is gone"):
        next(pieces)
    assert not zipfile.is_zipfile(io.BytesIO(sent))
