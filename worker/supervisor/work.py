"""Claim and run jobs, one after the other, until there is none."""

import time

import structlog

from app.store import claims, tables
from app.store.attempts import Held
from app.store.session import transaction
from worker.supervisor.host import Host, Source
from worker.supervisor.lease import is_outage
from worker.supervisor.run import Run
from worker.supervisor.slots import Seat

log = structlog.get_logger(__name__)


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
