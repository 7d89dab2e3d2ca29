"""What running jobs read stays on the shelf, and what that leaves no room for is not made."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.worker.shelves import aged, entry, names, used, weight
from worker.data import shelf as shelf_module
from worker.data.shelf import Entry, NoRoom, Shelf

pytestmark = pytest.mark.worker


def test_what_is_in_use_stays_and_what_nobody_uses_goes_for_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 250)
    reader = used(shelf, "a", 100)
    aged(reader.folder, 60)
    aged(entry(shelf, "b", 100), 30)
    entry(shelf, "c", 100)
    assert names(tmp_path) == ["a", "c"], "the older one is read"
    del reader
    aged(tmp_path / "a", 60)
    entry(shelf, "d", 100)
    assert names(tmp_path) == ["c", "d"]


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("budget", "TUNEYARD_CACHE_BYTES allows 250 B, 100 B of it in use by running jobs"),
        ("disk", "the worker's disk has room for 180 B beside 100 B in use by running jobs"),
    ],
)
def test_where_what_is_in_use_leaves_no_room_nothing_is_removed(
    limit: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path, 250 if limit == "budget" else 10**9)
    reader = used(shelf, "a", 100)
    entry(shelf, "b", 100)
    if limit == "disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=shelf_module.FREE_FLOOR_BYTES + 80)
        monkeypatch.setattr(shelf_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoRoom) as raised:
        entry(shelf, "c", 200)
    assert says in str(raised.value)
    assert shelf.shortage({"c": 200}) == str(raised.value)
    assert shelf.shortage({"c": 150}) is None
    assert names(tmp_path) == ["a", "b"]
    del reader
    assert shelf.shortage({"c": 200}) is None


def test_what_is_there_needs_no_room_even_where_others_use_all_of_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 250)
    readers = [used(shelf, "a", 100), used(shelf, "b", 100)]
    assert shelf.shortage({"a": 100, "b": 100}) is None
    assert shelf.shortage({"a": 100, "c": 50}) is None
    says = "TUNEYARD_CACHE_BYTES allows 250 B, 100 B of it for what is read with it, 100 B of it in use by running jobs"
    assert shelf.shortage({"a": 100, "c": 51}) == says
    assert not used(shelf, "a", 100).made
    assert len(readers) == 2


READER = """
import sys, time
from pathlib import Path
from worker.data.shelf import Shelf

reader = Shelf(Path(sys.argv[1]), 150).get("a", {"x": 100}, lambda folder: None)
print("reads", flush=True)
time.sleep(60)
"""


def test_what_another_process_reads_stays_until_it_is_dead(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 150)
    with subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reads\n"
        with pytest.raises(NoRoom):
            entry(shelf, "b", 100)
        process.send_signal(signal.SIGKILL)
    entry(shelf, "b", 100)
    assert names(tmp_path) == ["b"]


def test_a_process_that_a_reader_starts_holds_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 150)
    reader = used(shelf, "a", 100)
    with subprocess.Popen(["sleep", "5"], close_fds=False) as process:
        del reader
        entry(shelf, "b", 100)
        process.kill()
    assert names(tmp_path) == ["b"]


def test_what_is_removed_before_it_could_be_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, flock = Shelf(tmp_path, 150), fcntl.flock
    entry(shelf, "a", 100)
    removed: list[bool] = []

    def late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not removed:
            removed.append(True)
            entry(shelf, "b", 100)
        flock(descriptor, operation)

    monkeypatch.setattr(shelf_module.fcntl, "flock", late)
    again = used(shelf, "a", 100)
    assert again.made
    assert names(tmp_path) == ["a"]
    assert os.path.samestat(os.fstat(again.lock), again.folder.stat())


def test_what_is_taken_while_room_is_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, limit = Shelf(tmp_path, 300), Shelf._limit
    for number, key in enumerate("abc"):
        aged(entry(shelf, key, 100), 60 - number)
    readers: list[Entry] = []

    def meanwhile(*given: Any, **sizes: int) -> str | None:
        if "to_come" not in sizes and not readers:  # it is known what may go, and the first is about to
            readers.append(used(shelf, "a", 100))
        return limit(*given, **sizes)

    monkeypatch.setattr(Shelf, "_limit", meanwhile)
    entry(shelf, "d", 100)
    assert names(tmp_path) == ["a", "c", "d"]


def test_who_is_left_no_room_by_what_others_are_making_waits_and_then_leaves_them_theirs(tmp_path: Path) -> None:
    shelf, waited = Shelf(tmp_path, 150), threading.Event()

    def first(_: Path) -> None:
        assert waited.wait(10)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(shelf.get, "a", {"x": 100}, first)
        while not list(tmp_path.glob(".a.part/x")):
            time.sleep(0.01)
        other = pool.submit(shelf.get, "b", {"x": 100}, lambda _: None, waiting=waited.set)
        with pytest.raises(NoRoom, match="100 B of it in use by running jobs"):
            other.result()
        assert one.result().made
    assert waited.is_set()
    assert names(tmp_path) == ["a"]


def test_bytes_that_do_not_come_free_are_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, usage = Shelf(tmp_path, 1000), shutil.disk_usage(tmp_path)
    entry(shelf, "a", 100)
    # Whatever is removed, as much is free as before: something beside the shelf keeps it.
    held = usage._replace(free=shelf_module.FREE_FLOOR_BYTES + 50)
    monkeypatch.setattr(shelf_module.shutil, "disk_usage", lambda _: held)
    with pytest.raises(NoRoom, match=r"the worker's disk has room for 50 B \(TUNEYARD"):
        entry(shelf, "b", 100)
    assert not weight(tmp_path)
    assert entry(shelf, "c", 50).exists()
