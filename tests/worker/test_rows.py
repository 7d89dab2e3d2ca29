"""Arrays that lie on the shelf, or in memory where it has no room for them."""

from pathlib import Path

import pytest
import torch

from app.domain.errors import ResourceFault
from tests.worker.shelves import entry, names
from worker.data import rows
from worker.data.rows import Array, cached_rows, mapped_rows
from worker.data.shelf import NoRoom, Shelf
from worker.parts import machine

pytestmark = pytest.mark.worker


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
