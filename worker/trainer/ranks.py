"""The other processes of a run: started, watched and ended by the first one, which is the trainer everybody else knows.

They are its children and belong to its process group, so whoever ends the group ends them; and they end by themselves
when it is gone. Each is told its part in one line on its standard input, which stays open as long as it is wanted, and
answers on its standard output: `ready`, then at most one failure.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import BaseModel

from app.domain.errors import DataFault, Failure, JobFault, ResourceFault, SystemFault, UserFault
from worker.parts import distributed
from worker.parts.tuning import Plan
from worker.report import Failed, Order, Reporter
from worker.trainer.lifeline import die_with_parent, exit_if_orphan

COMMAND = (sys.executable, "-P", "-m", "worker.trainer", "rank")
GRACE_SECONDS = 10.0  # for the first process to notice by itself that it lost another
NOTICE_SECONDS = 3.0  # for the death of a process to be seen after the talk with it broke off
END_SECONDS = 10.0
READY = "ready"


class Told(BaseModel):
    """What a process is told."""

    order: Order
    plan: Plan
    rank: int
    store: str  # a file through which all find each other
    parent: int


@contextmanager
def together(order: Order, plan: Plan, checkpoint: Path | None, reporter: Reporter) -> Iterator[None]:
    """Be the first of `plan.world_size` processes that train together; on one process nothing happens.

    Args:
        checkpoint: where all of them go on from.

    Raises:
        JobFault: another process failed or was killed.
        MemoryError: another process ran out of memory.
    """
    if plan.world_size == 1:
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix=".processes-", dir=order.scratch))
    ranks = _Ranks(plan.world_size, reporter)
    try:
        told = order.model_copy(update={"checkpoint": str(checkpoint) if checkpoint else None})
        ranks.begin(told, plan, folder / "store")
        joined = distributed.joined(folder / "store", 0, plan.world_size, plan.device)
        with ranks.ended_by_an_error(), joined, ranks.ended_by_an_error():
            reporter.event(
                "processes.joined", f"{plan.world_size} processes train together.", processes=plan.world_size
            )  # fmt: skip
            yield
        ranks.end()
    finally:
        ranks.kill()
        shutil.rmtree(folder, ignore_errors=True)


class _Ranks:
    """The children of the first process."""

    def __init__(self, count: int, reporter: Reporter) -> None:
        self._count, self._reporter = count, reporter
        self._over, self._lost = threading.Event(), threading.Event()
        self._ready = threading.Semaphore(0)
        self._codes: dict[int, int] = {}
        self._failures: dict[int, Failure] = {}
        self._processes = {
            rank: subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for rank in range(1, count)
        }
        for rank in self._processes:
            threading.Thread(target=self._listen, args=(rank,), name=f"rank-{rank}", daemon=True).start()

    def begin(self, order: Order, plan: Plan, store: Path) -> None:
        """Tell every process its part and wait until all are ready."""
        for rank, process in self._processes.items():
            told = Told(order=order, plan=plan, rank=rank, store=str(store), parent=os.getpid())
            assert process.stdin is not None
            with suppress(OSError):  # whoever is dead already is noticed below
                process.stdin.write(told.model_dump_json().encode() + b"\n")
                process.stdin.flush()
        for _ in self._processes:
            while not self._ready.acquire(timeout=0.2):
                if self._lost.is_set():
                    raise self.fault(within=0.0) or SystemFault("A process of this run was lost.")

    @contextmanager
    def ended_by_an_error(self) -> Iterator[None]:
        """End the others when something goes wrong here, before their group is left; raise what was wrong with them.

        The error of this process is often nothing but theirs, as it looks from here; and where it is not, the group
        breaks for them as soon as it is left, and what they would say of that is nothing to go by.
        """
        try:
            yield
        except BaseException as error:
            may_be_theirs = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
            lost = self.fault(within=NOTICE_SECONDS) if may_be_theirs and not self._over.is_set() else None
            self.kill()
            if lost is None:
                raise
            raise lost from error

    def end(self) -> None:
        """Let the others go, who have nothing left to do."""
        self._over.set()
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))

    def kill(self) -> None:
        """End the others, whatever they do."""
        self._over.set()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()

    def fault(self, *, within: float) -> JobFault | MemoryError | None:
        """Say why another process ended before its time; None when none did so `within` some seconds."""
        if not self._lost.wait(within):
            return None
        # One death brings others with it: what was killed from outside or knows its own reason comes first.
        for rank, code in self._codes.items():
            if code < 0:
                name = signal.Signals(-code).name
                return SystemFault(f"Process {rank + 1} of {self._count} was killed ({name}).", code="process_lost")
        failures = sorted(self._failures.values(), key=lambda failure: failure.code == "crash")
        if failures and (failures[0].code, failures[0].phase) == ("out_of_memory", "train"):
            return MemoryError(failures[0].message)
        if failures:
            first = failures[0]
            return _FAULTS[first.fault](first.message, code=first.code, hint=first.hint, phase=first.phase)
        return SystemFault(f"One of {self._count} processes ended without a word.", code="process_lost")

    def _listen(self, rank: int) -> None:
        process = self._processes[rank]
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                said = json.loads(line)
                if said == READY:
                    self._ready.release()
                else:
                    self._failures[rank] = Failure.model_validate(said)
        code = process.wait()
        if self._over.is_set():
            return
        self._codes[rank] = code
        self._lost.set()
        # Sockets of a process that died break off. A GPU's collective may wait for ever instead: then all of us end.
        if not self._over.wait(GRACE_SECONDS):
            fault = self.fault(within=0.0)
            if not isinstance(fault, JobFault):
                # Not the end: the attempt after it takes less memory.
                fault = SystemFault(str(fault), code="out_of_memory")
            self._reporter.send(Failed(error=fault.failure("train")))
            for other in self._processes.values():
                other.kill()
            os._exit(1)


_FAULTS = {fault.fault: fault for fault in (UserFault, DataFault, ResourceFault, SystemFault)}


def follow(work: Callable[[Told, Callable[[], None], Callable[[JobFault], NoReturn]], None]) -> int:
    """Be one of the others: read what there is to do, do it, and stay until the first process closes the line.

    `work` gets what was told, a function to call when it is about to join, and one that says a failure and ends this
    process at once, wherever it is called; it raises nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    line = sys.stdin.readline()
    if not line:
        return 75
    told = Told.model_validate_json(line)
    die_with_parent()
    exit_if_orphan(told.parent)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to the log

    def say(what: object) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    def give_up(fault: JobFault) -> NoReturn:
        say(fault.failure("train").model_dump())
        traceback.print_exc()
        os._exit(1)

    done = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0 if done.is_set() else 75)

    line_end = threading.Thread(target=watch, name="line", daemon=True)
    line_end.start()
    work(told, lambda: say(READY), give_up)
    done.set()
    line_end.join()
    return 0
