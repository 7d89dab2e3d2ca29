"""A full disk: what has to be written ends the job by its name, what can be made again does not."""

import contextlib
import errno
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.data import shelf
from worker.report import Event, Planned, Saved

pytestmark = pytest.mark.worker


@contextlib.contextmanager
def full_disk() -> Iterator[Callable[[int], None]]:
    """Give what lets every write beyond so many bytes of a file fail, as on a full disk, without filling one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What is about to be written when the disk fills up: from which message on, and with which parameters.
MOMENTS: dict[str, tuple[Callable[[Any], bool], dict[str, Any]]] = {
    "decoded images": (lambda message: True, {}),
    "cached features": (lambda message: isinstance(message, Planned), {"trainable": "head"}),
    "a checkpoint": (lambda message: getattr(message, "code", "") == "train.first_step", {}),
    "the model": (lambda message: isinstance(message, Saved) and message.step == 10, {}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_a_failure_whatever_was_being_written(moment: str, digits: DatasetFacts, tmp_path: Path) -> None:
    from_then_on, params = MOMENTS[moment]
    order = sets.order(sets.spec(params=params, training={"checkpoint_every": 5, "epochs": 2}), digits, tmp_path)
    with full_disk() as limit:

        def fill(message: Any) -> None:
            if from_then_on(message):
                limit(1000)

        if moment == "decoded images":
            limit(1000)
        heard, last = sets.failed(order, fill)
    assert (last.error.fault, last.error.code, last.error.retryable) == ("resource", "disk_full", False)
    assert "disk" in last.error.message
    assert len(heard.of(Saved)) == (2 if moment == "the model" else 0)
    left = [path.name for path in Path(order.cache).glob("*/*") if not path.name.startswith(".")]
    assert len(left) == (0 if moment == "decoded images" else 2), "nothing half is left in a cache"
    assert ("data.streaming" in heard.codes()) == (moment == "decoded images"), "they are no reason to fail"


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_a_disk_without_room_for_what_is_derived_changes_no_bit(
    trainable: str, digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sets.spec(params={"trainable": trainable})
    roomy, cramped = (sets.order(spec, digits, tmp_path / name) for name in ("roomy", "cramped"))
    sets.finished(roomy)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelf.os, "posix_fallocate", full)
    heard, _ = sets.finished(cramped)
    assert "data.streaming" in heard.codes()
    streaming = next(event for event in heard.of(Event) if event.code == "data.streaming")
    assert "the worker's disk is full: No space left on device" in streaming.message
    assert sets.weights_sha256(cramped) == sets.weights_sha256(roomy)
    assert not list((Path(cramped.cache) / "shelf").glob("[!.]*"))
