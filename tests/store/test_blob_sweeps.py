"""What nothing refers to is swept, and nothing else: whoever stores the same bytes meanwhile, whoever crashes."""

import os
import secrets
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.dialects import sqlite

from app.settings import Settings
from app.store import blobs as blobs_module
from app.store import tables
from app.store.blobs import Blobs, open_blobs
from tests.store.bytes import Crash, age, incoming, keep, place_of, refer, row

pytestmark = pytest.mark.store


class TestSweep:
    GRACE = 3600.0

    def test_what_nothing_refers_to_goes_after_its_grace(self, engine: Engine, store: Blobs) -> None:
        stored = keep(engine, store, secrets.token_bytes(10))
        store.sweep(engine, self.GRACE)
        assert store.exists(stored.sha256)
        age(engine, stored.sha256)
        assert store.sweep(engine, self.GRACE) >= 1
        assert not store.exists(stored.sha256)
        assert row(engine, stored.sha256) is None

    def test_what_is_referred_to_stays(self, engine: Engine, store: Blobs) -> None:
        stored = keep(engine, store, secrets.token_bytes(10))
        refer(engine, stored)
        age(engine, stored.sha256)
        store.sweep(engine, self.GRACE)
        assert store.exists(stored.sha256)
        assert row(engine, stored.sha256) is not None

    def test_every_foreign_key_counts(self) -> None:
        """A table added later is covered by itself; this says which are there now."""
        unused = blobs_module._unused(1.0)  # pyright: ignore[reportPrivateUsage]
        query = str(select(tables.Blob.sha256).where(unused).compile(dialect=sqlite.dialect()))
        for column in ("uploads.sha256", "shards.sha256", "shards.thumbnails_sha256", "checkpoints.sha256",
                       "job_files.sha256", "model_files.sha256"):  # fmt: skip
            assert column in query

    def test_a_put_that_comes_while_it_looks_is_seen(
        self, engine: Engine, store: Blobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It chose its candidates, and then somebody stored the same bytes again: it must look again under the lock."""
        data = secrets.token_bytes(10)
        stored = keep(engine, store, data)
        age(engine, stored.sha256)
        real, calls = blobs_module.transaction, 0

        def transaction_after_a_put(engine: Engine, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:  # between the list of candidates and the first lock
                monkeypatch.setattr(blobs_module, "transaction", real)
                keep(engine, store, data)
            return real(engine, **options)

        monkeypatch.setattr(blobs_module, "transaction", transaction_after_a_put)
        store.sweep(engine, self.GRACE)
        assert calls == 2
        assert store.exists(stored.sha256)
        assert row(engine, stored.sha256) is not None

    def test_a_put_that_comes_while_it_deletes_waits_and_stores_anew(
        self, engine: Engine, store: Blobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = secrets.token_bytes(10)
        stored = keep(engine, store, data)
        age(engine, stored.sha256)
        real, deleting = place_of(store).remove, threading.Event()
        writer = threading.Thread(target=lambda: (deleting.wait(60), keep(engine, store, data)))

        def remove(sha256: str) -> None:
            if sha256 == stored.sha256:
                deleting.set()
                writer.join(0.3)
                assert writer.is_alive(), "the writer must wait for the row"
            real(sha256)

        monkeypatch.setattr(place_of(store), "remove", remove)
        writer.start()
        store.sweep(engine, self.GRACE)
        writer.join(60)
        assert store.exists(stored.sha256)
        assert row(engine, stored.sha256) is not None

    def test_two_sweeps_and_a_writer_in_a_loop_never_lose_bytes(self, engine: Engine, tmp_path: Path) -> None:
        store = open_blobs(Settings.model_validate({"home": tmp_path / "home"}))
        stop, errors = threading.Event(), []
        data = secrets.token_bytes(10)

        def sweep() -> None:
            try:
                while not stop.is_set():
                    store.sweep(engine, self.GRACE)
            except Exception as error:
                errors.append(error)

        sweepers = [threading.Thread(target=sweep) for _ in range(2)]
        for sweeper in sweepers:
            sweeper.start()
        try:
            for _ in range(25):
                stored = keep(engine, store, data)
                assert store.exists(stored.sha256), "a grace period protects it"
                age(engine, stored.sha256)
        finally:
            stop.set()
            for sweeper in sweepers:
                sweeper.join()
        assert errors == []

    def test_a_crash_while_deleting_is_made_good_by_the_next(
        self, engine: Engine, store: Blobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = keep(engine, store, secrets.token_bytes(10))
        age(engine, stored.sha256)
        real = place_of(store).remove

        def remove_and_crash(sha256: str) -> None:
            real(sha256)
            raise Crash

        with monkeypatch.context() as broken:
            broken.setattr(place_of(store), "remove", remove_and_crash)
            with pytest.raises(Crash):
                store.sweep(engine, self.GRACE)
        store.sweep(engine, self.GRACE)
        assert row(engine, stored.sha256) is None

    def test_forgotten_temporary_files_go_and_living_ones_stay(self, engine: Engine, tmp_path: Path) -> None:
        store = open_blobs(Settings.model_validate({"home": tmp_path / "home"}))
        forgotten, living = store.receive(), store.receive()
        forgotten.finish()
        living.write(b"x")
        (oldest,) = [path for path in incoming(store) if path == forgotten._path]  # pyright: ignore[reportPrivateUsage]
        os.utime(oldest, (1, 1))
        store.sweep(engine, 0)
        assert incoming(store) == [living._path]  # pyright: ignore[reportPrivateUsage]
        living.abort()
