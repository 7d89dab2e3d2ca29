"""Checkpoints: complete or not there, equal for equal states, and refused when damaged or when the disk is full."""

import contextlib
import errno
import os
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from app.domain.errors import ResourceFault, SystemFault
from tests.worker.sets import Heard
from worker import checkpoint
from worker.checkpoint import Checkpoints, Contents

pytestmark = pytest.mark.worker


def contents(value: float = 1.0) -> Contents:
    return Contents({"model.w": torch.full((3, 2), value), "window.values": torch.arange(4)}, {"b": 2, "a": [1, None]})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    odd = torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    shared = torch.rand(6)
    given = Contents({"a": odd, "b": shared, "c": shared, "d": shared[2:4], "e": torch.tensor(3)}, {"step": 7})
    checkpoint.write(tmp_path / "c", given)
    found = checkpoint.read(tmp_path / "c")
    assert found.state == {"step": 7}
    assert all(torch.equal(found.tensors[name], value) for name, value in given.tensors.items())
    assert found.tensors.keys() == given.tensors.keys()


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "one", contents())
    reordered = Contents(dict(reversed(contents().tensors.items())), {"a": [1, None], "b": 2})
    checkpoint.write(tmp_path / "two", reordered)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert list(file.metadata()) == ["state"], "more than one key would come in no fixed order"


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    heard = Heard()
    checkpoints = Checkpoints(tmp_path, heard.reporter)

    def kept() -> list[int]:
        return [int(path.stem.partition("-")[2]) for path in sorted(tmp_path.glob("checkpoint-*"))]

    for step, best_step in enumerate((1, 1, 3, 3, 3, 3), start=1):
        checkpoints.save(contents(step), step=step, epoch=0, metrics={}, best_step=best_step)
    assert kept() == [3, 5, 6]
    newest = checkpoints.load()
    assert newest is not None
    assert newest.tensors["model.w"][0, 0] == 6
    checkpoints.save(contents(9), step=9, epoch=0, metrics={}, best_step=8)
    assert kept() == [6, 9], "step 8 is the best, and was not saved"


def test_a_disk_without_hard_links_keeps_the_newest_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint.os, "link", refused)
    kept = Checkpoints(tmp_path, Heard().reporter)
    kept.save(contents(), step=1, epoch=0, metrics={}, best_step=None)
    (tmp_path / "checkpoint-000000001.safetensors").unlink()  # the supervisor took it
    found = kept.load()
    assert found is not None
    assert found.state == contents().state


def test_a_file_that_the_supervisor_took_is_not_missed(tmp_path: Path) -> None:
    heard = Heard(lambda message: (tmp_path / message.file).unlink())  # type: ignore[func-returns-value,attr-defined]
    checkpoints = Checkpoints(tmp_path, heard.reporter)
    for step in range(1, 5):
        checkpoints.save(contents(step), step=step, epoch=0, metrics={}, best_step=None)
    newest = checkpoints.load()
    assert newest is not None, "a run that must start over in this process still has its last checkpoint"
    assert newest.tensors["model.w"][0, 0] == 4


@pytest.mark.parametrize("damage", ["cut", "flipped header", "empty", "missing", "other format"])
def test_damage_is_a_fault_and_never_a_crash(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, contents())
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped header":
            path.write_bytes(data[:20] + b"\xff" + data[21:])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "other format":
            path.write_bytes(data.replace(b'\\"format\\":1', b'\\"format\\":9'))
    with pytest.raises(SystemFault, match=r"c\.safetensors"):
        checkpoint.read(path)


def test_a_full_disk_is_a_failure_and_leaves_nothing_half(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "earlier", contents())
    # A limit on the size of files ends a write as a full disk does, without filling one.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ResourceFault, match="disk is full"):
            checkpoint.write(tmp_path / "later", Contents({"model.w": torch.zeros(100_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    checkpoint.read(tmp_path / "earlier")


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    sync, replace = checkpoint.sync, Path.replace

    def synced(path: Path) -> None:
        done.append(("sync", path.name))
        sync(path)

    def replaced(path: Path, target: Path) -> Path:
        done.append(("replace", path.name))
        return replace(path, target)

    monkeypatch.setattr(checkpoint, "sync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    checkpoint.write(tmp_path / "c", contents())
    assert done == [("sync", ".c.partial"), ("replace", ".c.partial"), ("sync", tmp_path.name)]


def die_at(point: int) -> None:
    """End this process without a word at its n-th call of one of these."""
    passes = 0
    for name in ("fsync", "replace", "open"):
        real = getattr(os, name)

        def call(*given: Any, real: Any = real, **named: Any) -> Any:
            nonlocal passes
            passes += 1
            if passes == point:
                os._exit(9)
            return real(*given, **named)

        setattr(os, name, call)


def test_a_kill_at_any_point_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    seen: set[tuple[int, float]] = set()
    for point in range(1, 9):
        checkpoint.write(path, Contents({"model.w": torch.full((1000,), 1.0)}, {"step": 1}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from 3.12 on Python warns when other threads are about
            pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                die_at(point)
                checkpoint.write(path, Contents({"model.w": torch.full((1000,), 2.0)}, {"step": 2}))
                code = 0
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = checkpoint.read(path)
        assert found.tensors["model.w"].unique().tolist() == [float(found.state["step"])]
        seen.add((code, float(found.state["step"])))
        if code == 0:
            break
    assert {(9, 1.0), (0, 2.0)} <= seen
