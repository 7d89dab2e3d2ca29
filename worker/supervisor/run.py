"""One attempt at one job: stage, hand to a warm trainer, relay its reports, publish its files, finish.

The one place where an exception, an exit code or a last word becomes the state of a job. Torch-free.
"""

import os
import queue
import signal
import time
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from app.domain.errors import Failure, JobFault, SystemFault
from app.domain.jobs import Status, Wanted
from app.store import attempts, checkpoints, endings, tables
from app.store.attempts import Fenced, Held
from app.store.blobs import Stored
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
from worker.supervisor.host import Host, Source
from worker.supervisor.lease import Lease
from worker.supervisor.outbox import Outbox
from worker.supervisor.server import Trainer
from worker.supervisor.slots import Seat
from worker.supervisor.stage import Scratch, Staged, stage
from worker.supervisor.wire import Wire

log = structlog.get_logger(__name__)

CANCEL_GRACE_SECONDS = 3.0  # for the trainer to end by itself; nothing it makes would be kept
EXIT_GRACE_SECONDS = 10.0  # from the last word to the exit
OUTPUT_TAIL_BYTES = 4000


class _NeedNotStart(Exception):
    """The job was cancelled, paused or handed back before there was a trainer."""


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
        self._outbox = Outbox(held, self._lease, since)
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
                    self._outbox.clear()  # it may be what could not be written
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

    # From here to the trainer nothing sleeps but the start of CUDA, and nothing is committed but the claim.
    def _attempt(self) -> None:
        host, settings = self._host, self._host.settings
        device = "cuda" if self._seat.gpus and self._job.device != "cpu" else "cpu"
        try:
            staged = stage(
                host.engine, host.blobs, settings, self._job, self._scratch, threads=host.threads, device=device,
                check=self._check,
            )  # fmt: skip
            self._note_damage(staged)
            trainer = host.warm.start(
                order=staged.path, log_file=self._scratch.log, threads=host.threads, check=self._check,
                gpus=self._seat.gpus if device == "cuda" else (),
            )  # fmt: skip
        except _NeedNotStart:
            self._end_before_it_starts()
            return
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
            self._outbox.events.append(Event(code="checkpoint.damaged", message=message, level="warning"))

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
                reports = wire.reports.get(timeout=self._outbox.patience)
            except queue.Empty:
                self._outbox.flush()
                continue
            if reports is None:
                return None
            for report in reports:
                if isinstance(report, (Finished, Failed)):
                    return report
                self._hear(wire, report)
            if self._outbox.due():
                self._outbox.flush()

    def _hear(self, wire: Wire, report: Report) -> None:
        match report:
            case Planned():
                self._begin(wire, report)
            case Saved():
                self._checkpoint(report)
            case Progress():
                self._outbox.progress = report.model_dump(exclude={"type"})
            case Metrics():
                self._outbox.rows.extend(report.rows)
            case Event():
                self._outbox.events.append(report)
            case _:
                raise AssertionError("a last word is not heard here")

    def _begin(self, wire: Wire, planned: Planned) -> None:
        self._outbox.forget_after(self._from_step)

        def begin(session: Session) -> None:
            attempts.begin(
                session, self._held, plan=planned.plan, fingerprint=planned.fingerprint, exact=planned.exact,
                from_step=self._from_step,
            )  # fmt: skip
            self._outbox.write(session)

        self._lease.write(begin)
        self._outbox.clear()
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
            self._outbox.write(session)
            attempts.write_checkpoint(
                session, self._held, step=saved.step, epoch=saved.epoch, metrics=saved.metrics,
                best_step=saved.best_step, bytes=stored.bytes, sha256=stored.sha256,
            )  # fmt: skip

        self._lease.write(write)
        self._outbox.clear()
        self._from_step = saved.step
        path.unlink(missing_ok=True)

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
            self._outbox.flush()
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
            self._outbox.events.append(
                Event(code="trainer.output", message=message, level="error", data={"output": output})
            )

    def _give_up(self, failure: Failure) -> None:
        def give_up(session: Session) -> Status:
            self._outbox.write(session)
            return endings.give_up(session, self._held, failure)

        after = self._lease.write(give_up)
        self._log.warning(
            "attempt failed", fault=failure.fault, code=failure.code, message=failure.message, status=after
        )

    def _finish(self, finished: Finished) -> None:
        """Store what was made, and commit it together with the end of the job."""
        if finished.outcome == "drained":
            self._outbox.flush()
            self._lease.write(lambda session: endings.release(session, self._held, "drained"))
            return
        if finished.outcome == "children":
            self._outbox.flush()
            self._lease.write(lambda session: endings.insert_children(session, self._held, list(finished.children)))
            return
        made = publish.store(finished, self._scratch, self._store)

        def finish(session: Session) -> tuple[Status, str | None]:
            self._outbox.write(session)
            return publish.finish(session, self._held, self._job, finished, made)

        after, model_id = self._lease.write(finish)
        self._log.info("finished", outcome=finished.outcome, status=after, model=model_id)
