"""`python -m worker.main`: a Celery worker whose tasks supervise training, and which also works without any broker.

Redis delivers a hint, the task claims the best job from SQL and supervises it to its end inside its own body. A
bootstep polls and sweeps besides. It hangs on the pool and not on the consumer, so it also runs when Redis was never
there. Torch-free: trainers are other processes.
"""

import importlib.metadata
import os
import platform
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import structlog
from celery import bootsteps, signals
from celery.platforms import SecurityWarning

from app import log as logs
from app.broker import QUEUES, WAKE_TASK, Publisher, celery_app
from app.settings import Settings
from app.store import recipes, sweeps, workers
from app.store.blobs import open_blobs
from app.store.ids import new_id
from app.store.session import make_engine, transaction
from worker import health
from worker.supervisor.host import Host, Source
from worker.supervisor.lease import is_outage
from worker.supervisor.server import Published
from worker.supervisor.slots import Slots, cores, find_gpus
from worker.supervisor.stage import tidy
from worker.supervisor.warm import COMMAND, Warm
from worker.supervisor.work import work

if TYPE_CHECKING:
    from celery import Celery

log = structlog.get_logger(__name__)

SPARE_THREADS = 2  # of the pool: so that a hint which finds no slot is dropped at once instead of waiting for a day
TIDY_SECONDS = 600.0
SIGN_SECONDS = 10.0
LAST_WORDS_SECONDS = 15.0  # after the drain, to store and commit; then the process ends, whatever hangs
WATCHED_LIBRARIES = ("tuneyard", "torch", "torchvision", "celery", "pyarrow")


class Idle:
    """What a worker does besides running jobs: beats, polls, sweeps, and keeps its zygote fresh."""

    def __init__(self, host: Host, dispatch: Callable[[Source, bool], None]) -> None:
        self._host, self._dispatch = host, dispatch
        self._poked = threading.Event()
        self._catalogue: Published | None = None
        self._offered = self._left = False
        self._listing = threading.Lock()
        self._failing: dict[str, str] = {}
        settings = host.settings
        self._duties: list[tuple[str, float, Callable[[], None]]] = [
            ("alive", SIGN_SECONDS, lambda: health.show(settings.home_path)),
            ("beat", settings.heartbeat_seconds, self._beat),
            ("poll", settings.poll_seconds, self._poll),
            ("sweep", settings.sweep_seconds, self._sweep),
            ("tidy", TIDY_SECONDS, self._tidy),
        ]
        self._due = {name: 0.0 for name, _, _ in self._duties}
        self._due["tidy"] = time.monotonic() + TIDY_SECONDS * random.random()  # noqa: S311

    def start(self) -> None:
        """Begin, in a thread that ends with the process: a draining worker still beats."""
        threading.Thread(target=self._run, name="idle", daemon=True).start()

    def offer(self, catalogue: Published) -> None:
        """There is a warm trainer: publish what it can run, be listed as a worker from now on, and look for work."""
        self._catalogue = catalogue
        self._due["beat"] = 0.0
        self.poke()

    def poke(self, _job_id: str = "", _internal: bool = False) -> None:
        """There may be work: poll now."""
        self._due["poll"] = 0.0
        self._poked.set()

    def leave(self) -> None:
        """Be listed no more."""
        with self._listing, transaction(self._host.engine) as session:
            self._left = True
            workers.leave(session, self._host.worker)

    def _run(self) -> None:
        while True:
            self._poked.clear()
            for name, every, duty in self._duties:
                if time.monotonic() < self._due[name]:
                    continue
                # The jitter keeps many workers from asking in step.
                self._due[name] = time.monotonic() + every * random.uniform(0.8, 1.2)  # noqa: S311
                self._try(name, duty)
            self._poked.wait(max(min(self._due.values()) - time.monotonic(), 0.0))

    def _try(self, name: str, duty: Callable[[], None]) -> None:
        try:
            duty()
        except Exception as error:
            # Once per kind of trouble: an outage of an hour is not a thousand lines.
            if self._failing.get(name) != type(error).__name__:
                if is_outage(error):
                    log.warning("the database does not answer", duty=name, error=str(error))
                else:
                    log.exception("a duty failed", duty=name)
            self._failing[name] = type(error).__name__
        else:
            if self._failing.pop(name, None):
                log.info("a duty works again", duty=name)

    def _beat(self) -> None:
        host, catalogue = self._host, self._catalogue
        if catalogue is None and not self._offered:  # whoever sees a worker in the list may count on it
            return
        with self._listing, transaction(host.engine) as session:
            if self._left:
                return
            if catalogue is not None:
                recipes.publish(session, catalogue)
            workers.beat(
                session, host.worker, host=socket.gethostname(), slots=host.slots.training, busy=host.slots.busy,
                gpus=[gpu.to_json() for gpu in host.slots.gpus], versions=versions(), draining=host.draining.is_set(),
            )  # fmt: skip
        if catalogue is not None:
            log.info("catalogue published", recipes=len(catalogue["recipes"]))
            self._offered = True
            if self._catalogue is catalogue:  # else a newer one came meanwhile
                self._catalogue = None

    def _poll(self) -> None:
        self._host.warm.refresh()
        if self._host.draining.is_set() or not self._host.warm.ready.is_set():
            return
        for internal in (True, False):
            if self._host.slots.free(internal=internal):
                self._dispatch("poll", internal)

    def _sweep(self) -> None:
        with transaction(self._host.engine) as session:
            found = sweeps.sweep(session, own=list(self._host.runs))
        for job_id, internal in found:
            self._host.announce(job_id, internal)

    def _tidy(self) -> None:
        host = self._host
        tidy(host.engine, host.blobs, host.settings)
        removed = host.blobs.sweep(host.engine, host.settings.blob_grace_seconds)
        if removed:
            log.info("unreferenced blobs removed", count=removed)


def versions() -> dict[str, str]:
    """Give the versions that decide what a job computes, without importing any of them."""
    found = {"python": platform.python_version()}
    for name in WATCHED_LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def serve(settings: Settings, *, command: Sequence[str] = COMMAND) -> int:
    """Run a worker until it is told to end; give its exit code."""
    logs.configure(settings)
    # Said of root in containers, because a broker could send pickles: ours may send nothing but JSON.
    warnings.simplefilter("ignore", SecurityWarning)
    engine = make_engine(settings.database, pool_size=20)
    gpus = find_gpus()
    slots = Slots(settings.slots, gpus)
    publisher = Publisher(settings)

    def announce(job_id: str, internal: bool) -> None:
        publisher.wake(job_id, internal=internal)
        idle.poke()  # without Redis, and to be quicker with it

    def dispatch(source: Source, internal: bool) -> None:
        controller.pool.apply_async(work, (host, source), {"internal": internal})

    warm = Warm(
        cache=settings.home_path / "cache",
        gpus=[gpu.index for gpu in gpus],
        command=command,
        on_ready=lambda catalogue: idle.offer(catalogue),
    )
    host = Host(
        settings=settings, engine=engine, blobs=open_blobs(settings), slots=slots, warm=warm, worker=new_id("wrk"),
        threads=settings.threads or max(1, cores() // slots.training), announce=announce,
    )  # fmt: skip
    idle = Idle(host, dispatch)
    app = _celery(host, idle)
    controller: Any = app.Worker(  # pyright: ignore[reportAttributeAccessIssue]
        pool="threads", concurrency=slots.training + 1 + SPARE_THREADS, queues=list(QUEUES), hostname=host.worker,
        without_gossip=True, without_mingle=True, without_heartbeat=True, quiet=True,
        loglevel=settings.log_level.upper(),
    )  # fmt: skip
    log.info("worker starts", worker=host.worker, pid=os.getpid(), slots=slots.training, threads=host.threads)
    controller.start()
    return _end(host, idle, publisher, int(controller.exitcode or 0))


def _celery(host: Host, idle: Idle) -> "Celery":
    app = celery_app(host.settings)

    def wake(job_id: str, internal: bool = False) -> None:
        log.info("message received", job=job_id, internal=internal, pid=os.getpid())
        run = host.runs.get(job_id)
        if run is not None:
            run.poke()  # it runs here: something else is wanted of it
        else:
            work(host, "message", internal=internal)
            if internal and host.slots.gpus:
                idle.poke()  # a measuring job takes a training slot here

    class Bootstep(bootsteps.StartStopStep):
        """Starts the idle duties as soon as there is a pool, with or without a broker."""

        requires = ("celery.worker.components:Pool",)

        def start(self, parent: Any) -> None:  # noqa: ARG002
            # Celery would restart itself on SIGHUP; who closes the terminal wants an orderly end.
            signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
            idle.start()

        def stop(self, parent: Any) -> None:  # noqa: ARG002
            host.drain()

    app.task(name=WAKE_TASK, ignore_result=True)(wake)
    app.steps["worker"].add(Bootstep)  # pyright: ignore[reportOptionalSubscript]
    # Connected weakly by default; these functions live as long as the process.
    signals.setup_logging.connect(_keep_our_logs, weak=False)
    signals.worker_shutting_down.connect(lambda **_: host.drain(), weak=False)
    threading.Thread(target=_bound_the_drain, args=(host,), name="drain", daemon=True).start()
    return app


def _keep_our_logs(**_: Any) -> None:
    """Stand in for Celery's own set-up of logging, which it leaves out when anybody listens to this signal."""


def _bound_the_drain(host: Host) -> None:
    """Celery's warm shutdown waits for ever; this one does not."""
    host.draining.wait()
    log.info("draining", worker=host.worker, running=len(host.runs))
    for run in list(host.runs.values()):
        run.changed()
    time.sleep(host.settings.drain_seconds + LAST_WORDS_SECONDS)
    log.error("the drain took too long: leaving the rest to the leases")
    os._exit(70)


def _end(host: Host, idle: Idle, publisher: Publisher, code: int) -> int:
    host.drain()
    host.warm.close()
    try:
        idle.leave()
    except Exception as error:
        log.warning("the worker's row stays until it is old", error=str(error))
    publisher.close()
    log.info("worker ended", worker=host.worker, code=code)
    return code


def main() -> int:
    """Read the settings from the environment and run a worker."""
    return serve(Settings())  # pyright: ignore[reportCallIssue]


if __name__ == "__main__":
    sys.exit(main())
