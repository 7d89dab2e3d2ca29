"""Slots: how many jobs run here at once, and on which devices. Messages and polls share one set. Torch-free."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from worker import cgroup


@dataclass(frozen=True)
class Gpu:
    """One GPU of this host, as the driver names it."""

    index: str  # what CUDA_VISIBLE_DEVICES takes
    name: str
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Give the form that the workers table holds."""
        return {"name": self.name, "memory_bytes": self.memory_bytes}


@dataclass(frozen=True)
class Seat:
    """What one running job occupies: the internal slot, or training slots with the GPUs that belong to them."""

    internal: bool
    numbers: tuple[int, ...]
    gpus: tuple[str, ...] = ()


class Slots:
    """`training` slots (one per GPU on a host that has any) and one more for internal jobs.

    Ingest must not wait behind a day of training, hence the extra slot. Nothing here blocks: who finds no free slot
    goes away, because a poll or the end of another job looks again.
    """

    def __init__(self, training: int, gpus: Sequence[Gpu] = ()) -> None:
        self.gpus = tuple(gpus)
        self.training = len(self.gpus) or training
        self._free = set(range(self.training))
        self._internal_free = True
        self._lock = threading.Lock()
        self._claiming = {False: threading.Lock(), True: threading.Lock()}

    @property
    def devices(self) -> frozenset[str]:
        """The kinds of device that a job may ask for here."""
        return frozenset({"cpu", "cuda"}) if self.gpus else frozenset({"cpu"})

    @property
    def busy(self) -> int:
        """Training slots in use."""
        with self._lock:
            return self.training - len(self._free)

    def free(self, *, internal: bool) -> int:
        """Count the free slots of one class."""
        with self._lock:
            return int(self._internal_free) if internal else len(self._free)

    @contextmanager
    def claiming(self, *, internal: bool) -> Iterator[int]:
        """Hold the right to claim a job of one class, and give how many slots are free for it.

        Within one process claims go one after the other, so that what was free when a job was chosen is still free
        when it takes its seat.
        """
        with self._claiming[internal]:
            yield self.free(internal=internal)

    def take(self, *, internal: bool, gpus: int = 1) -> Seat:
        """Take a seat inside `claiming`; on a host without GPUs every job takes one slot.

        Raises:
            LookupError: fewer slots are free than the job needs.
        """
        with self._lock:
            if internal:
                if not self._internal_free:
                    raise LookupError("the internal slot is taken")
                self._internal_free = False
                return Seat(True, ())
            wanted = gpus if self.gpus else 1
            if wanted > len(self._free):
                raise LookupError(f"{wanted} slots are wanted and {len(self._free)} are free")
            numbers = tuple(sorted(self._free)[:wanted])
            self._free -= set(numbers)
            return Seat(False, numbers, tuple(self.gpus[number].index for number in numbers) if self.gpus else ())

    def give_back(self, seat: Seat) -> None:
        """Free a seat."""
        with self._lock:
            if seat.internal:
                self._internal_free = True
            self._free |= set(seat.numbers)


def find_gpus() -> tuple[Gpu, ...]:
    """Ask the driver's own tool for the GPUs that this process may see; none where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return parse_gpus(answer, None if visible is None else tuple(filter(None, visible.split(","))))


def parse_gpus(answer: str, visible: Sequence[str] | None = None) -> tuple[Gpu, ...]:
    """Read `index, uuid, name, MiB` lines, and keep what `CUDA_VISIBLE_DEVICES` names, in its order."""
    known: dict[str, Gpu] = {}
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 4 or not fields[3].isdigit():
            continue
        index, uuid, name, mebibytes = fields
        known[index] = Gpu(index, name, int(mebibytes) * 2**20)
        known[uuid] = Gpu(uuid, name, int(mebibytes) * 2**20)
    if visible is None:
        return tuple(gpu for key, gpu in known.items() if key.isdigit())
    return tuple(known[key] for key in visible if key in known)


def cores() -> int:
    """Count the processors that this process may use: its affinity, capped by the container's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.processors()
    return available if quota is None else max(1, min(available, int(quota)))
