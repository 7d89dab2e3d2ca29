"""Bytes: whole or not there at all, on local disk and on S3, whoever crashes."""

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.settings import Settings
from app.store import blobs as blobs_module
from app.store import local_disk
from app.store.blobs import CHUNK, Blobs, CorruptBlob, MissingBlob, open_blobs
from app.store.local_disk import LocalDisk
from tests.store.bytes import Crash, age, incoming, keep, place_of, row

pytestmark = pytest.mark.store


class TestStoring:
    def test_what_goes_in_comes_out(self, engine: Engine, store: Blobs) -> None:
        data = secrets.token_bytes(3 * CHUNK + 17)
        stored = keep(engine, store, data)
        assert (stored.sha256, stored.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert b"".join(store.open(stored.sha256)) == data
        assert store.size(stored.sha256) == len(data)
        assert store.exists(stored.sha256)
        store.verify(stored.sha256)
        kept = row(engine, stored.sha256)
        assert kept is not None
        assert kept.bytes == len(data)
        assert incoming(store) == []

    def test_nothing_at_all_is_something_too(self, engine: Engine, store: Blobs) -> None:
        stored = keep(engine, store, b"")
        assert b"".join(store.open(stored.sha256)) == b""
        assert store.size(stored.sha256) == 0

    @pytest.mark.parametrize(
        ("start", "end"), [(0, None), (0, 1), (5, None), (5, 10), (CHUNK - 1, CHUNK + 1), (7, 7), (10, 10**9)]
    )
    def test_ranges(self, engine: Engine, store: Blobs, start: int, end: int | None) -> None:
        data = secrets.token_bytes(CHUNK + 100)
        stored = keep(engine, store, data)
        assert b"".join(store.open(stored.sha256, start, end)) == data[start:end]

    def test_the_same_bytes_are_stored_once(self, engine: Engine, store: Blobs) -> None:
        data = secrets.token_bytes(100)
        first = keep(engine, store, data)
        age(engine, first.sha256)
        assert keep(engine, store, data).sha256 == first.sha256
        kept = row(engine, first.sha256)
        assert kept is not None
        assert kept.touched_at > 1e9, "whoever stores them again has a new grace period"

    def test_an_aborted_stream_leaves_nothing(self, engine: Engine, store: Blobs) -> None:
        sink = store.receive()
        sink.write(b"half")
        assert len(incoming(store)) == 1
        sink.abort()
        assert incoming(store) == []

    @pytest.mark.parametrize("read", ["open", "size", "verify", "fetch"])
    def test_missing_bytes_are_said_to_be_missing(self, store: Blobs, tmp_path: Path, read: str) -> None:
        missing = "0" * 64
        reads: dict[str, Callable[[], object]] = {
            "open": lambda: store.open(missing),
            "size": lambda: store.size(missing),
            "verify": lambda: store.verify(missing),
            "fetch": lambda: store.fetch(missing, tmp_path / "x"),
        }
        with pytest.raises(MissingBlob, match="0000"):
            reads[read]()
        assert not store.exists(missing)
        assert not (tmp_path / "x").exists()

    def test_deleting_twice_is_harmless(self, engine: Engine, store: Blobs) -> None:
        stored = keep(engine, store, secrets.token_bytes(10))
        store.delete(stored.sha256)
        store.delete(stored.sha256)
        assert not store.exists(stored.sha256)


class TestFiles:
    def _file(self, folder: Path, data: bytes) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(data)
        return path

    def test_a_file_is_stored_and_read_back(self, engine: Engine, store: Blobs, tmp_path: Path) -> None:
        data = secrets.token_bytes(CHUNK + 3)
        path = self._file(tmp_path, data)
        stored = store.put_file(engine, path)
        assert (stored.sha256, stored.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert b"".join(store.open(stored.sha256)) == data
        path.unlink()
        assert b"".join(store.open(stored.sha256)) == data
        assert incoming(store) == []

    def test_an_old_file_is_safe_from_the_sweep_on_its_way_in(
        self, engine: Engine, store: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self._file(tmp_path, secrets.token_bytes(10))
        os.utime(path, (1, 1))
        real = place_of(store).put

        def put(temporary: Path, sha256: str) -> None:
            store.sweep(engine, 24 * 3600)
            real(temporary, sha256)

        monkeypatch.setattr(place_of(store), "put", put)
        stored = store.put_file(engine, path)
        assert store.exists(stored.sha256)

    def test_another_disk_is_copied_from(
        self, engine: Engine, store: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_links(*_: object, **__: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_links)
        data = secrets.token_bytes(100)
        stored = store.put_file(engine, self._file(tmp_path, data))
        store.fetch(stored.sha256, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        assert incoming(store) == []

    def test_a_fetched_file_is_whole_and_replaces_what_was_there(
        self, engine: Engine, store: Blobs, tmp_path: Path
    ) -> None:
        data = secrets.token_bytes(2 * CHUNK)
        stored = keep(engine, store, data)
        to = tmp_path / "cache" / "blobs" / stored.sha256
        for _ in range(2):
            store.fetch(stored.sha256, to)
            assert to.read_bytes() == data
            assert [path.name for path in to.parent.iterdir()] == [stored.sha256]
        to.unlink()
        to.write_bytes(b"old")
        store.fetch(stored.sha256, to)
        assert to.read_bytes() == data

    def test_only_a_local_store_has_paths(self, engine: Engine, store: Blobs) -> None:
        data = secrets.token_bytes(10)
        stored = keep(engine, store, data)
        path = store.path(stored.sha256)
        if isinstance(place_of(store), LocalDisk):
            assert path is not None
            assert path.read_bytes() == data
            assert path.stat().st_mode & 0o222 == 0, "caches link to it, so nobody may write to it"
        else:
            assert path is None


class TestDamage:
    """A flipped bit and a truncation are found whenever somebody reads back."""

    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]])
    def test_it_is_found(self, engine: Engine, store: Blobs, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
        data = secrets.token_bytes(1000)
        stored = keep(engine, store, data)
        temporary = tmp_path / "damaged"
        temporary.write_bytes(damage(data))
        place_of(store).put(temporary, stored.sha256)
        with pytest.raises(CorruptBlob):
            store.verify(stored.sha256)
        with pytest.raises(CorruptBlob):
            store.fetch(stored.sha256, tmp_path / "to" / "here")
        assert list((tmp_path / "to").iterdir()) == []
        keep(engine, store, data)
        store.verify(stored.sha256)

    def test_a_file_that_is_damaged_on_its_way_is_not_stored_as_good(
        self, engine: Engine, store: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = place_of(store).put

        def put(temporary: Path, sha256: str) -> None:
            damaged = tmp_path / "damaged"
            damaged.write_bytes(b"something else")
            real(damaged, sha256)

        monkeypatch.setattr(place_of(store), "put", put)
        path = tmp_path / "file"
        path.write_bytes(secrets.token_bytes(100))
        with pytest.raises(CorruptBlob):
            store.put_file(engine, path)


STEPS = ("sync file", "row", "chmod", "rename", "sync folder")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", ["stream", "file"])
def test_a_crash_between_any_two_steps_leaves_nothing_half_visible(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, way: str
) -> None:
    """Whatever is there under the final name is whole, has its row, and the sweep removes all traces."""
    store = open_blobs(Settings.model_validate({"home": tmp_path / "home"}))
    data = secrets.token_bytes(1000)
    sha256 = hashlib.sha256(data).hexdigest()
    file = tmp_path / "file"
    file.write_bytes(data)

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    target: dict[str, tuple[object, str]] = {
        "sync file": (os, "fsync"),
        "row": (blobs_module, "_touch"),
        "chmod": (Path, "chmod"),
        "rename": (os, "replace"),
        "sync folder": (local_disk, "_sync_folder"),
    }
    with monkeypatch.context() as broken:
        broken.setattr(*target[step], crash)
        with pytest.raises(Crash):
            store.put_file(engine, file) if way == "file" else keep(engine, store, data)
    if store.exists(sha256):
        assert row(engine, sha256) is not None, "bytes without a row would never be swept"
        assert b"".join(store.open(sha256)) == data
    # The next try succeeds, whatever the crash left.
    keep(engine, store, data)
    store.verify(sha256)
    age(engine, sha256)
    for left in incoming(store):
        os.utime(left, (1, 1))
    store.sweep(engine, 3600)
    assert not store.exists(sha256)
    assert row(engine, sha256) is None
    assert incoming(store) == []


def test_bytes_are_synced_before_their_name_and_the_folder_after_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut: file, row, name, folder."""
    store = open_blobs(Settings.model_validate({"home": tmp_path / "home"}))
    order: list[str] = []

    def spy(owner: object, name: str, label: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            order.append(label)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    spy(blobs_module, "_touch", "row")
    spy(os, "fsync", "sync")
    spy(os, "replace", "name")
    keep(engine, store, b"x" * 10)
    assert order == ["sync", "row", "sync", "name", "sync"]  # the second: the new folder's own name


class TestSettings:
    @pytest.mark.parametrize("blobs", ["bucket/prefix", "http://bucket", "s3://"])
    def test_a_wrong_address_is_refused(self, tmp_path: Path, blobs: str) -> None:
        with pytest.raises(ValueError, match="s3://bucket/prefix"):
            open_blobs(Settings.model_validate({"home": tmp_path, "blobs": blobs}))

    def test_objects_lie_under_the_prefix(self, engine: Engine, s3_settings: Settings, s3_endpoint: str) -> None:
        import httpx

        stored = keep(engine, open_blobs(s3_settings), secrets.token_bytes(10))
        listing = httpx.get(f"{s3_endpoint}/bucket?list-type=2&prefix=some/prefix/{stored.sha256}").text
        assert f"<Key>some/prefix/{stored.sha256}</Key>" in listing

    def test_a_large_file_goes_up_in_parts(self, engine: Engine, s3_settings: Settings, tmp_path: Path) -> None:
        store = open_blobs(s3_settings)
        path = tmp_path / "large"
        path.write_bytes(secrets.token_bytes(CHUNK) * 40)
        stored = store.put_file(engine, path)
        assert store.size(stored.sha256) == 40 * CHUNK
