"""The Celery object, its queues and task names, and the publisher of wake-ups.

A message is a hint that there is work, never the truth: it carries a job id and nothing else. Losing every message
costs one poll interval of a worker, so publishing is best effort and never happens on a request's way.
"""

import contextlib
import queue
import threading
import time
from typing import TYPE_CHECKING

import structlog

from app.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

log = structlog.get_logger(__name__)

WAKE_TASK = "tuneyard.wake"
TRAINING_QUEUE = "tuneyard.training"
INTERNAL_QUEUE = "tuneyard.internal"
QUEUES = (TRAINING_QUEUE, INTERNAL_QUEUE)

STALE_SECONDS = 10.0  # an older hint tells nothing that a poll has not found


def queue_name(*, internal: bool) -> str:
    """The queue for training jobs, or the one for internal jobs."""
    return INTERNAL_QUEUE if internal else TRAINING_QUEUE


def celery_app(settings: Settings) -> "Celery":
    """Make the Celery object. Without a Redis URL it gets a broker inside its own process, and workers only poll."""
    from celery import Celery
    from kombu import Queue

    app = Celery("tuneyard", broker=settings.redis_url or "memory://", set_as_current=False)
    app.conf.update(
        # The truth is in SQL, so a message may be acknowledged at once and lost: no visibility timeout, no twin.
        task_acks_late=False,
        task_ignore_result=True,
        worker_disable_prefetch=settings.redis_url is not None,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_redirect_stdouts=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        accept_content=["json"],
        task_serializer="json",
        # Without these a half-open link leaves a worker deaf for ever (celery#10502).
        broker_transport_options={
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 5,
        },
        task_queues=[Queue(name, routing_key=name) for name in QUEUES],
        task_default_queue=TRAINING_QUEUE,
        task_create_missing_queues=False,
    )
    return app


class Publisher:
    """Publishes wake-ups from a thread of its own; a slow or absent Redis is noticed by nobody else."""

    def __init__(self, settings: Settings, *, capacity: int = 1000) -> None:
        self._settings = settings
        self._hints: queue.Queue[tuple[str, bool, float] | None] = queue.Queue(maxsize=capacity)
        self._thread: threading.Thread | None = None
        if settings.redis_url is not None:
            self._thread = threading.Thread(target=self._publish, name="publisher", daemon=True)
            self._thread.start()

    def wake(self, job_id: str, *, internal: bool = False) -> None:
        """Hint that a job may be taken, or that something else is wanted of it; returns at once and never fails."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._hints.put_nowait((job_id, internal, time.monotonic()))

    def close(self, *, timeout: float = 1.0) -> None:
        """Send what is still waiting, for at most `timeout` seconds, and stop."""
        if self._thread is None:
            return
        try:
            self._hints.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _publish(self) -> None:
        app = celery_app(self._settings)
        failing = False
        while (hint := self._hints.get()) is not None:
            job_id, internal, asked = hint
            if time.monotonic() - asked > STALE_SECONDS:
                continue
            try:
                app.send_task(
                    WAKE_TASK, args=(job_id,), kwargs={"internal": internal}, queue=queue_name(internal=internal),
                    retry=False, ignore_result=True,
                )  # fmt: skip
            except Exception as error:  # kombu and redis raise many kinds, and none of them may stop the thread
                if not failing:
                    log.warning("wake-ups cannot be published, workers will poll", error=str(error))
                failing = True
            else:
                if failing:
                    log.info("wake-ups are published again")
                log.info("wake-up published", job=job_id, queue=queue_name(internal=internal))
                failing = False
        app.close()
