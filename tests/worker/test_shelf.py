"""The shelf: one budget for everything on it, kept by makers that die, that wait, and that come two at once."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from app.domain.errors import ResourceFault
from worker.data import rows
from worker.data import shelf as shelf_module
from worker.data.rows import Array, cached_rows
from worker.data.shelf import NoRoom, Shelf
from worker.disk import amount

pytestmark = pytest.mark.worker


def entry(shelf: Shelf, key: str, size: int) -> Path:
    return shelf.get(key, {"x": size}, lambda _: None)[0]


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
    assert shelf.shortage(251) is not None
    assert shelf.shortage(250) is None
    says = "TUNEYARD_CACHE_BYTES allows 250 B, 100 B of it for what is read with it"
    assert shelf.shortage(250, beside={"a"}) == says


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
    folder, _ = Shelf(tmp_path, 250).get("a", {"x": 3}, lambda partial: os.utime(partial, (0, 0)))
    assert time.time() - folder.stat().st_mtime < 3600


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
from worker.data.shelf import NoRoom, Shelf
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

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(shelf.get, "a", {"x": 100}, first)
        while not list(tmp_path.glob(".a.part/x")):
            time.sleep(0.01)
        other = pool.submit(shelf.get, "b", {"x": 100}, second, waiting=waited.set)
        one.result()
        other.result()
    assert waited.is_set()
    assert seen == [100, 100]
    assert names(tmp_path) == ["b"]


def test_makers_for_whom_there_is_room_do_not_wait_for_each_other(tmp_path: Path) -> None:
    shelf, both = Shelf(tmp_path, 200), threading.Barrier(2, timeout=10)

    def meet(_: Path) -> None:
        both.wait()

    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(shelf.get, key, {"x": 100}, meet) for key in ("a", "b")]
    assert all(each.result()[1] for each in made)


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


def test_bytes_that_others_still_read_are_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, usage = Shelf(tmp_path, 1000), shutil.disk_usage(tmp_path)
    entry(shelf, "a", 100)
    # Whatever is removed, as much is free as before: a process has it mapped.
    held = usage._replace(free=shelf_module.FREE_FLOOR_BYTES + 50)
    monkeypatch.setattr(shelf_module.shutil, "disk_usage", lambda _: held)
    with pytest.raises(NoRoom, match=r"the worker's disk has 268.4 MB free beside running jobs"):
        entry(shelf, "b", 100)
    assert not weight(tmp_path)
    assert entry(shelf, "c", 50).exists()


def test_a_file_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 1000)
    os.truncate(entry(shelf, "a", 100) / "x", 99)
    folder, made = shelf.get("a", {"x": 100}, lambda _: None)
    assert made
    assert (folder / "x").stat().st_size == 100
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


def test_bytes_are_said_in_a_unit_that_fits() -> None:
    counts = (0, 999, 1000, 12_345, 999_600, 5.2e6, 999.6e6, 13.1e9, 2e12)
    said = ["0 B", "999 B", "1.0 kB", "12.3 kB", "1.0 MB", "5.2 MB", "1.0 GB", "13.1 GB", "2000.0 GB"]
    assert [amount(count) for count in counts] == said
