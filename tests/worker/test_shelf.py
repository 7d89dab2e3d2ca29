"""The shelf: one budget for everything on it, kept by makers that die, that wait, and that come two at once."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.worker.shelves import entry, names, used, weight
from worker.data import shelf as shelf_module
from worker.data.rows import Array, cached_rows
from worker.data.shelf import Shelf
from worker.disk import amount

pytestmark = pytest.mark.worker


def test_the_shelf_lets_go_of_what_was_not_used_for_longest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 250)
    for age, key in ((30, "a"), (20, "b")):
        os.utime(entry(shelf, key, 100), times=(time.time() - age, time.time() - age))
    entry(shelf, "a", 100)  # used again: now the youngest
    entry(shelf, "c", 100)
    assert names(tmp_path) == ["a", "c"]
    assert shelf.shortage({"d": 251}) is not None
    assert shelf.shortage({"d": 200, "e": 50}) is None
    says = "TUNEYARD_CACHE_BYTES allows 250 B, 100 B of it for what is read with it"
    assert shelf.shortage({"d": 250}, beside={"a"}) == says


def test_a_shelf_may_hold_more_entries_than_a_process_may_open_files(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 80 * 100)
    for number in range(80):
        entry(shelf, f"{number:02}", 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
    try:
        assert shelf.shortage({"new": 150}) is None
        entry(shelf, "new", 150)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert names(tmp_path) == [*(f"{number:02}" for number in range(2, 80)), "new"]


def test_bytes_are_on_the_disk_before_an_entry_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bytes, list[str]]] = []
    sync = shelf_module.sync

    def noted(path: Path) -> None:
        sync(path)
        synced.append((path.name, path.read_bytes(), names(tmp_path)))

    monkeypatch.setattr(shelf_module, "sync", noted)

    def make(folder: Path) -> None:
        for file in ("x", "y"):
            (folder / file).write_bytes(file.encode() * 3)

    Shelf(tmp_path, 250).get("a", {"x": 3, "y": 3}, make)
    assert synced == [("x", b"xxx", []), ("y", b"yyy", [])]
    assert names(tmp_path) == ["a"]


def test_what_took_long_to_make_is_as_young_as_its_name(tmp_path: Path) -> None:
    made = Shelf(tmp_path, 250).get("a", {"x": 3}, lambda partial: os.utime(partial, (0, 0)))
    assert time.time() - made.folder.stat().st_mtime < 3600


def test_a_maker_that_failed_leaves_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 250)

    def fail(folder: Path) -> None:
        (folder / "x").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.get("a", {"x": 10}, fail)
    assert names(tmp_path) == []
    assert weight(tmp_path) == 0
    assert (entry(shelf, "a", 10) / "x").stat().st_size == 10


MAKER = """
import sys, time
from pathlib import Path
from worker.data.shelf import Entry, NoRoom, Shelf
from worker.disk import amount

def make(folder):
    print("making", flush=True)
    time.sleep(60)

Shelf(Path(sys.argv[1]), 150).get("dead", {"x": 100}, make)
"""


@pytest.mark.parametrize("key", ["dead", "another"])
def test_what_a_killed_process_was_making_goes_and_makes_room(key: str, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"making\n"
        assert weight(tmp_path) == 100, "it has its whole size from the first moment"
        process.send_signal(signal.SIGKILL)
    assert weight(tmp_path) == 100
    entry(Shelf(tmp_path, 150), key, 100)
    assert names(tmp_path) == [key]
    assert weight(tmp_path) == 100


def test_two_makers_at_once_keep_the_budget_and_the_second_gives_signs_of_life(tmp_path: Path) -> None:
    shelf, waited = Shelf(tmp_path, 150), threading.Event()
    seen: list[int] = []

    def first(_: Path) -> None:
        waited.wait(10)
        seen.append(weight(tmp_path))

    def second(_: Path) -> None:
        seen.append(weight(tmp_path))

    def get(key: str, make: Callable[[Path], None], waiting: Callable[[], None]) -> bool:
        return shelf.get(key, {"x": 100}, make, waiting=waiting).made  # and is used no longer

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(get, "a", first, lambda: None)
        while not list(tmp_path.glob(".a.part/x")):
            time.sleep(0.01)
        other = pool.submit(get, "b", second, waited.set)
        assert one.result()
        assert other.result()
    assert waited.is_set()
    assert seen == [100, 100]
    assert names(tmp_path) == ["b"]


def test_makers_for_whom_there_is_room_do_not_wait_for_each_other(tmp_path: Path) -> None:
    shelf, both = Shelf(tmp_path, 200), threading.Barrier(2, timeout=10)

    def meet(_: Path) -> None:
        both.wait()

    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(shelf.get, key, {"x": 100}, meet) for key in ("a", "b")]
    assert all(each.result().made for each in made)


def test_who_waits_for_what_another_makes_gives_signs_of_life(tmp_path: Path) -> None:
    shelf, ticked = Shelf(tmp_path, 1000), threading.Event()
    seen: list[int] = []
    arrays = {"x": Array(torch.int64, (3,))}

    def fill(made: dict[str, torch.Tensor]) -> None:
        assert ticked.wait(10)
        made["x"].copy_(torch.arange(3))

    def tick(number: int) -> None:
        seen.append(number)
        if len(seen) == 3:
            ticked.set()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cached_rows, shelf, "a", arrays, fill, lambda _: None)
        while not list(tmp_path.glob(".a.part/x")):
            time.sleep(0.01)
        found, made = pool.submit(cached_rows, shelf, "a", arrays, fill, tick).result()
        assert one.result()[1]
    assert not made
    assert seen[:3] == [1, 2, 3], "a supervisor takes the same word again for silence"
    assert found["x"].tolist() == [0, 1, 2]


def test_a_file_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 1000)
    os.truncate(entry(shelf, "a", 100) / "x", 99)
    again = used(shelf, "a", 100)
    assert again.made
    assert (again.folder / "x").stat().st_size == 100
    assert names(tmp_path) == ["a"]


def test_bytes_are_said_in_a_unit_that_fits() -> None:
    counts = (0, 999, 1000, 12_345, 999_600, 5.2e6, 999.6e6, 13.1e9, 2e12)
    said = ["0 B", "999 B", "1.0 kB", "12.3 kB", "1.0 MB", "5.2 MB", "1.0 GB", "13.1 GB", "2000.0 GB"]
    assert [amount(count) for count in counts] == said
