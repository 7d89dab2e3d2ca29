"""One attempt at one job: claim, stage, hand to a warm trainer, relay its reports, publish its files, finish.

The one place where an exception, an exit code or a last word becomes the state of a job. Torch-free.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.domain.errors import Failure, JobFault, SystemFault
from app.domain.jobs import Status, Wanted
from app.settings import Settings
from app.store import attempts, checkpoints, claims, endings, tables
from app.store.attempts import Fenced, Held
from app.store.blobs import Blobs, Stored
from app.store.session import transaction
from worker.report import (
    Event,
    Failed,
    Finished,
    Metrics,
    Planned,
    Progress,
    Report,
    Saved,
    Wish,
)  # fmt: skip
from worker.supervisor import publish
from worker.supervisor.deaths import Verdict, failure_of_death, failure_of_supervisor, oom_kills
from worker.supervisor.lease import Lease, is_outage
from worker.supervisor.slots import Seat, Slots
from worker.supervisor.stage import Scratch, Staged, stage
from worker.supervisor.warm import Trainer, Warm
from worker.supervisor.wire import Wire

log = structlog.get_logger(__name__)

Source = Literal["message", "poll"]

FLUSH_SECONDS = 1.5
FLUSH_BURST = 3.0  # the first lines of a run go out at once
FLUSH_ROWS = 20_000
CANCEL_GRACE_SECONDS = 3.0  # for the trainer to end by itself; nothing it makes would be kept
EXIT_GRACE_SECONDS = 10.0  # from the last word to the exit
OUTPUT_TAIL_BYTES = 4000


@dataclass
class Host:
    """What one worker process has; shared by its runs."""

    settings: Settings
    engine: Engine
    blobs: Blobs
    slots: Slots
    warm: Warm
    worker: str  # the id under which it holds jobs
    threads: int
    announce: Callable[[str, bool], None]  # tells of a job that can be claimed
    draining: threading.Event = field(default_factory=threading.Event)
    drain_at: float = float("inf")  # when a drain began, monotonic
    runs: dict[str, "Run"] = field(default_factory=dict)

    def drain(self) -> None:
        """Take no more jobs, and ask the running ones for a checkpoint; safe in a signal handler."""
        self.drain_at = min(self.drain_at, time.monotonic())
        self.draining.set()


def work(host: Host, source: Source, *, internal: bool) -> int:
    """Claim and run jobs of one class until there is none, no slot, or the worker drains; give how many were run."""
    count = 0
    while not host.draining.is_set() and host.warm.ready.is_set():
        try:
            claimed = claim(host, source, internal=internal)
        except Exception as error:  # the next poll comes soon
            if is_outage(error):
                log.warning("the database does not answer", error=str(error))
            else:
                log.exception("no job could be claimed")
            break
        if claimed is None:
            break
        held, job, seat, since = claimed
        try:
            Run(host, held, job, seat, source, since).run()
        finally:
            host.slots.give_back(seat)
        count, source = count + 1, "poll"  # what follows was found without a message
    return count


def claim(host: Host, source: Source, *, internal: bool) -> tuple[Held, tables.Job, Seat, float] | None:
    """Take the best job that fits the free slots, and a seat for it."""
    with host.slots.claiming(internal=internal) as free:
        if not free:
            return None
        since = time.monotonic()
        with transaction(host.engine) as session:
            found = claims.claim(
                session, worker=host.worker, source=source, internal=internal, devices=host.slots.devices,
                gpus_free=free if host.slots.gpus else 0, gpus=len(host.slots.gpus),
                lease_seconds=host.settings.lease_seconds,
            )  # fmt: skip
        if found is None:
            return None
        held, job = found
        gpus = 1 if job.device == "cpu" else job.gpus
        return held, job, host.slots.take(internal=internal, gpus=gpus), since


class _NeedNotStart(Exception):
    """The job was cancelled, paused or handed back before there was a trainer."""


@dataclass
class _Pending:
    """What the trainer said and no transaction has written yet."""

    rows: list[tuple[str, int, float | None]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    progress: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.rows or self.events or self.progress)


class Run:
    """One attempt, from the claim to the end of its trainer."""

    def __init__(self, host: Host, held: Held, job: tables.Job, seat: Seat, source: Source, since: float) -> None:
        self._host, self._held, self._job, self._seat = host, held, job, seat
        self._log = log.bind(job=held.job_id, attempt=held.attempt, source=source, pid=os.getpid())
        self._since = since
        self._scratch = Scratch(host.settings, held.job_id, held.attempt)
        self._lease = Lease(
            host.engine, held, host.settings, on_change=self.changed, on_wake=host.announce, claimed=since
        )
        self._from_step = 0  # what another plan in the middle of this run would go on from
        self._wire: Wire | None = None
        self._pending = _Pending()
        self._credit, self._flushed = FLUSH_BURST, since
        self._killed_by_kernel = oom_kills()

    def poke(self) -> None:
        """Something may be wanted of this job: ask at once."""
        self._lease.poke()

    def run(self) -> None:
        """Run it; whatever happens, nothing is raised, and the job is left in the right state or to its lease."""
        self._log.info("claimed", recipe=self._job.recipe, worker=self._held.worker)
        self._host.runs[self._held.job_id] = self
        try:
            with self._lease:
                try:
                    self._attempt()
                except Fenced:
                    raise
                except JobFault as fault:
                    self._give_up(fault.failure("run"))
                except Exception as error:
                    self._log.exception("the supervisor failed")
                    self._pending = _Pending()  # it may be what could not be written
                    self._give_up(failure_of_supervisor(error))
        except Fenced:
            self._log.warning("the job is no longer ours: closed without a word")
        except Exception:
            self._log.exception("the supervisor failed: the job is left to its lease")
        finally:
            if self._host.runs.get(self._held.job_id) is self:  # a later attempt may run here already
                del self._host.runs[self._held.job_id]
            self._scratch.remove()
            self._log.info("run over", seconds=round(time.monotonic() - self._since, 3))

    def wish(self) -> Wish:
        """Say what the trainer shall do, and set the deadline for it."""
        wanted, drained = self._lease.wanted, self._host.draining.is_set()
        if self._wire is not None:
            if wanted is Wanted.CANCEL:
                self._wire.kill_at(time.monotonic() + CANCEL_GRACE_SECONDS, "cancelled")
            if drained:
                self._wire.kill_at(self._host.drain_at + self._host.settings.drain_seconds, "drained")
        if wanted is Wanted.RUN and drained:
            return "drain"
        return wanted.value

    def changed(self) -> None:
        if self._wire is not None:
            self._wire.poke()

    # From here to the fork nothing sleeps, and nothing is committed but the claim.
    def _attempt(self) -> None:
        host, settings = self._host, self._host.settings
        device = "cuda" if self._seat.gpus and self._job.device != "cpu" else "cpu"
        try:
            staged = stage(
                host.engine, host.blobs, settings, self._job, self._scratch, threads=host.threads, device=device,
                check=self._check,
            )  # fmt: skip
        except _NeedNotStart:
            self._end_before_it_starts()
            return
        self._note_damage(staged)
        trainer = host.warm.start(
            order=staged.path, log_file=self._scratch.log, threads=host.threads,
            gpus=self._seat.gpus if device == "cuda" else (),
        )  # fmt: skip
        self._log.info(
            "trainer started", trainer=trainer.pid, milliseconds=round((time.monotonic() - self._since) * 1e3)
        )
        self._wire = Wire(
            trainer, wish=self.wish, confirmed=lambda: self._lease.confirmed, fence_seconds=settings.fence_seconds,
            progress_seconds=settings.progress_seconds, log_file=self._scratch.log,
        )  # fmt: skip
        try:
            last = self._relay(self._wire)
            self._conclude(self._wire, trainer, last)
            trainer.wait(EXIT_GRACE_SECONDS)
        finally:
            self._wire.close()

    def _note_damage(self, staged: Staged) -> None:
        self._from_step = staged.from_step
        for checkpoint in staged.damaged:
            message = f"The checkpoint of step {checkpoint.step} is damaged; the one before it is used."
            self._pending.events.append(Event(code="checkpoint.damaged", message=message, level="warning"))

        def discard(session: Session) -> None:
            self._lease.beat(session)
            for checkpoint in staged.damaged:
                checkpoints.discard(session, checkpoint.id)

        if staged.damaged:
            self._lease.write(discard)

    def _check(self) -> None:
        self._lease.check()
        if self.wish() in ("cancel", "pause", "drain"):
            raise _NeedNotStart

    def _end_before_it_starts(self) -> None:
        match self._lease.wanted:
            case Wanted.CANCEL:
                self._lease.write(lambda session: endings.finish(session, self._held, Status.CANCELLED))
            case Wanted.PAUSE:
                self._lease.write(lambda session: endings.finish(session, self._held, Status.PAUSED))
            case _:
                self._lease.write(lambda session: endings.release(session, self._held, "drained"))

    def _relay(self, wire: Wire) -> Finished | Failed | None:
        """Pass on what the trainer says until its last word; None when it ended without one."""
        while True:
            try:
                reports = wire.reports.get(timeout=FLUSH_SECONDS if self._pending else None)
            except queue.Empty:
                self._flush()
                continue
            if reports is None:
                return None
            for report in reports:
                if isinstance(report, (Finished, Failed)):
                    return report
                self._hear(wire, report)
            if self._may_flush():
                self._flush()

    def _hear(self, wire: Wire, report: Report) -> None:
        match report:
            case Planned():
                self._begin(wire, report)
            case Saved():
                self._checkpoint(report)
            case Progress():
                self._pending.progress = report.model_dump(exclude={"type"})
            case Metrics():
                self._pending.rows.extend(report.rows)
            case Event():
                self._pending.events.append(report)
            case _:
                raise AssertionError("a last word is not heard here")

    def _begin(self, wire: Wire, planned: Planned) -> None:
        def begin(session: Session) -> None:
            attempts.begin(
                session, self._held, plan=planned.plan, fingerprint=planned.fingerprint, exact=planned.exact,
                from_step=self._from_step,
            )  # fmt: skip
            self._write_pending(session)

        self._lease.write(begin)
        self._pending = _Pending()
        wire.go()
        self._log.info("running", milliseconds=round((time.monotonic() - self._since) * 1e3))

    def _checkpoint(self, saved: Saved) -> None:
        try:
            path = self._scratch.find(saved.file)
            stored = self._store(path)
        except (SystemFault, OSError):
            if not self._scratch.is_gone(saved.file):
                raise
            # The trainer keeps its last two: newer ones came while this one waited for the database or the disk.
            self._log.info("checkpoint superseded before it was stored", step=saved.step)
            return

        def write(session: Session) -> None:
            # One commit: a checkpoint is never listed before the metrics that led to it.
            self._write_pending(session)
            attempts.write_checkpoint(
                session, self._held, step=saved.step, epoch=saved.epoch, metrics=saved.metrics, best=saved.best,
                bytes=stored.bytes, sha256=stored.sha256,
            )  # fmt: skip

        self._lease.write(write)
        self._pending, self._from_step = _Pending(), saved.step
        path.unlink(missing_ok=True)

    def _may_flush(self) -> bool:
        if not self._pending:
            return False
        now = time.monotonic()
        self._credit = min(FLUSH_BURST, self._credit + (now - self._flushed) / FLUSH_SECONDS)
        self._flushed = now
        return self._credit >= 1.0 or len(self._pending.rows) > FLUSH_ROWS

    def _flush(self) -> None:
        self._credit = max(self._credit - 1.0, 0.0)
        if self._pending:
            self._lease.write(self._write_pending)
            self._pending = _Pending()

    def _write_pending(self, session: Session) -> None:
        if self._pending.progress is not None:
            self._lease.progress = self._pending.progress
        self._lease.beat(session)
        for event in self._pending.events:
            attempts.write_event(
                session, self._held, code=event.code, message=event.message, level=event.level, data=event.data
            )
        if self._pending.rows:
            attempts.write_metrics(session, self._held, self._pending.rows)

    def _store(self, path: Path) -> Stored:
        self._lease.check()
        return self._host.blobs.put_file(self._host.engine, path)

    def _conclude(self, wire: Wire, trainer: Trainer, last: Finished | Failed | None) -> None:
        if isinstance(last, Finished):
            self._finish(last)
        elif isinstance(last, Failed):
            self._give_up(last.error)
        else:
            code = trainer.wait(EXIT_GRACE_SECONDS)
            if code is None:
                wire.kill("silent")
                code = trainer.wait(EXIT_GRACE_SECONDS)
            self._conclude_death(wire.verdict, code)

    def _conclude_death(self, verdict: Verdict | None, code: int | None) -> None:
        """The trainer ended without a last word: what was wanted, what we did to it and how it ended say the rest."""
        self._lease.check()
        self._log.warning("trainer ended without a last word", verdict=verdict, code=code)
        if verdict == "drained":
            self._flush()
            self._lease.write(lambda session: endings.release(session, self._held, "drained"))
        elif verdict == "cancelled":
            self._lease.write(lambda session: endings.finish(session, self._held, Status.CANCELLED))
        else:
            out_of_memory = verdict is None and code == -signal.SIGKILL and oom_kills() > self._killed_by_kernel
            self._note_output()
            self._give_up(failure_of_death(verdict, code, out_of_memory=out_of_memory, losses=self._job.losses))

    def _note_output(self) -> None:
        try:
            with self._scratch.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - OUTPUT_TAIL_BYTES))
                output = file.read().decode(errors="replace").replace("\0", "\ufffd").strip()
        except OSError:
            return
        if output:
            self._log.warning("last output of the trainer", output=output)
            message = "The last lines that the trainer printed."
            self._pending.events.append(
                Event(code="trainer.output", message=message, level="error", data={"output": output})
            )

    def _give_up(self, failure: Failure) -> None:
        def give_up(session: Session) -> Status:
            self._write_pending(session)
            return endings.give_up(session, self._held, failure)

        after = self._lease.write(give_up)
        self._log.warning(
            "attempt failed", fault=failure.fault, code=failure.code, message=failure.message, status=after
        )

    def _finish(self, finished: Finished) -> None:
        """Store what was made, and commit it together with the end of the job."""
        if finished.outcome == "drained":
            self._flush()
            self._lease.write(lambda session: endings.release(session, self._held, "drained"))
            return
        if finished.outcome == "children":
            self._flush()
            self._lease.write(lambda session: endings.insert_children(session, self._held, list(finished.children)))
            return
        made = publish.store(finished, self._scratch, self._store)

        def finish(session: Session) -> tuple[Status, str | None]:
            self._write_pending(session)
            return publish.finish(session, self._held, self._job, finished, made)

        after, model_id = self._lease.write(finish)
        self._log.info("finished", outcome=finished.outcome, status=after, model=model_id)
