"""The shelf: one budget for everything on it, kept by makers that die, that wait, and that come two at once."""

import fcntl
import os
import shutil
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

from app.domain.errors import ResourceFault
from worker.data import rows
from worker.data import shelf as shelf_module
from worker.data.rows import Array, cached_rows, mapped_rows
from worker.data.shelf import Entry, NoRoom, Shelf
from worker.disk import amount
from worker.parts import machine

pytestmark = pytest.mark.worker


def entry(shelf: Shelf, key: str, size: int) -> Path:
    """Have an entry made or found, and use it no longer."""
    return used(shelf, key, size).folder


def used(shelf: Shelf, key: str, size: int) -> Entry:
    return shelf.get(key, {"x": size}, lambda _: None)


def weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bfloat16, torch.float64])
def test_arrays_of_every_kind_come_back_as_they_were_filled(dtype: torch.dtype, tmp_path: Path) -> None:
    arrays = {"x": Array(dtype, (2, 3)), "none": Array(dtype, (0, 3))}
    values = torch.arange(6).view(2, 3).to(dtype)

    def fill(made: dict[str, torch.Tensor]) -> None:
        made["x"][:] = values

    in_memory, _ = cached_rows(Shelf(tmp_path / "none", 0), "a", arrays, fill, lambda _: None)
    for expected in (True, False):
        found, made = cached_rows(Shelf(tmp_path / "shelf", 1000), "a", arrays, fill, lambda _: None)
        assert made == expected
        for each in (found, in_memory):
            assert each["x"].tolist() == values.tolist()
            assert (each["x"].dtype, each["none"].shape) == (dtype, (0, 3))


def aged(folder: Path, seconds: float) -> None:
    os.utime(folder, times=(time.time() - seconds, time.time() - seconds))


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


def test_an_entry_is_in_use_as_long_as_something_reads_its_memory(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 150)
    arrays = {"x": Array(torch.uint8, (100,)), "none": Array(torch.uint8, (0,))}

    def fill(made: dict[str, torch.Tensor]) -> None:
        made["x"].fill_(7)

    found, _ = mapped_rows(shelf, "a", arrays, fill, lambda _: None)
    few = found["x"][3:5]
    del found
    with pytest.raises(NoRoom, match="in use by running jobs"):
        entry(shelf, "b", 100)
    assert few.tolist() == [7, 7]
    del few
    entry(shelf, "b", 100)
    assert names(tmp_path) == ["b"]


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
    with subprocess.Popen(["sleep", "5"]) as process:
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


def test_a_file_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 1000)
    os.truncate(entry(shelf, "a", 100) / "x", 99)
    again = used(shelf, "a", 100)
    assert again.made
    assert (again.folder / "x").stat().st_size == 100
    assert names(tmp_path) == ["a"]


def test_what_fits_neither_disk_nor_memory_is_refused_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MEMORY_PART", 10**30)
    arrays = {"x": Array(torch.int64, (3,))}
    with pytest.raises(ResourceFault, match=r"24 B are .* disk, and TUNEYARD_CACHE_BYTES allows 0 B") as raised:
        cached_rows(Shelf(tmp_path, 0), "a", arrays, lambda _: None, lambda _: None)
    assert raised.value.code == "disk_full"
    assert "TUNEYARD_CACHE_BYTES" in (raised.value.hint or "")


@pytest.mark.parametrize(("processes", "fits"), [(1, True), (2, True), (3, False)])
def test_memory_is_shared_by_the_processes_of_a_run(
    processes: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2 * 24 * rows.MEMORY_PART)
    arrays = {"x": Array(torch.int64, (3,))}

    def get() -> bool:
        return cached_rows(Shelf(tmp_path, 0), "a", arrays, lambda _: None, lambda _: None, processes=processes)[1]

    if fits:
        assert get()
    else:
        with pytest.raises(ResourceFault, match="24 B are to be kept on disk"):
            get()


def test_bytes_are_said_in_a_unit_that_fits() -> None:
    counts = (0, 999, 1000, 12_345, 999_600, 5.2e6, 999.6e6, 13.1e9, 2e12)
    said = ["0 B", "999 B", "1.0 kB", "12.3 kB", "1.0 MB", "5.2 MB", "1.0 GB", "13.1 GB", "2000.0 GB"]
    assert [amount(count) for count in counts] == said
