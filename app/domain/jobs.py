"""The life of a job: its states, who may move it where, and what a request, a loss or a failure leads to. Pure."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from app.domain.errors import Conflict, Failure


class Kind(StrEnum):
    """What a job is for; `internal` jobs (ingest, import, measuring) share the same life."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    APPLY = "apply"
    INTERNAL = "internal"


class Status(StrEnum):
    """Where a job is. While a worker holds a job, only that worker writes this."""

    WAITING = "waiting"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Wanted(StrEnum):
    """What the user last asked for; the worker hears it in the answer to its heartbeat."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"
    CANCEL = "cancel"


class Actor(StrEnum):
    """Who moves a job."""

    API = "api"
    WORKER = "worker"  # the one that holds the job, under its fencing token
    CLAIM = "claim"  # a worker that takes a queued job
    SWEEP = "sweep"  # any worker: expired leases, satisfied waits


TERMINAL = frozenset({Status.SUCCEEDED, Status.STOPPED, Status.FAILED, Status.CANCELLED})
HELD = frozenset({Status.STARTING, Status.RUNNING})

_WORKER_ENDS = (Status.SUCCEEDED, Status.STOPPED, Status.FAILED, Status.CANCELLED, Status.PAUSED, Status.QUEUED)

TRANSITIONS: dict[tuple[Status | None, Status], frozenset[Actor]] = {
    (None, Status.QUEUED): frozenset({Actor.API, Actor.WORKER}),  # a worker inserts children and internal jobs
    (None, Status.WAITING): frozenset({Actor.API, Actor.WORKER}),
    (Status.WAITING, Status.QUEUED): frozenset({Actor.WORKER, Actor.SWEEP}),
    (Status.WAITING, Status.FAILED): frozenset({Actor.WORKER, Actor.SWEEP}),
    (Status.QUEUED, Status.STARTING): frozenset({Actor.CLAIM}),
    (Status.STARTING, Status.RUNNING): frozenset({Actor.WORKER}),
    **{(held, end): frozenset({Actor.WORKER}) for held in HELD for end in _WORKER_ENDS},
    # An orchestrating parent hands its slot back while its children run.
    **{(held, Status.WAITING): frozenset({Actor.WORKER}) for held in HELD},
    **{
        (held, end): frozenset({Actor.WORKER, Actor.SWEEP})
        for held in HELD
        for end in (Status.QUEUED, Status.FAILED, Status.CANCELLED, Status.PAUSED)
    },
    **{(idle, Status.CANCELLED): frozenset({Actor.API}) for idle in (Status.WAITING, Status.QUEUED, Status.PAUSED)},
    (Status.QUEUED, Status.PAUSED): frozenset({Actor.API}),
    (Status.PAUSED, Status.QUEUED): frozenset({Actor.API}),
}


def permitted(before: Status | None, after: Status, actor: Actor) -> bool:
    """Say whether `actor` may move a job from `before` to `after`."""
    return actor in TRANSITIONS.get((before, after), frozenset())


@dataclass(frozen=True)
class Move:
    """What a decision comes to: a new status (or None to leave it to the worker), a new wish, and a reason."""

    status: Status | None = None
    wanted: Wanted | None = None
    reason: str | None = None
    delay_seconds: float = 0.0
    failure: Failure | None = None
    counts_as_loss: bool = False


Verb = Literal["cancel", "stop", "pause", "resume"]


def on_request(verb: Verb, status: Status, wanted: Wanted, *, has_checkpoint: bool) -> Move:
    """Decide what a user's verb does to a job.

    Asking twice is harmless: a verb whose end is already reached, or already on its way, changes nothing.

    Raises:
        Conflict: the verb makes no sense in this state; the error carries the current status.
    """
    if status in HELD:
        return _ask_worker(verb, status, wanted)
    match verb, status:
        case "cancel", Status.CANCELLED:
            return Move()
        case "cancel", Status.WAITING | Status.QUEUED | Status.PAUSED:
            return Move(status=Status.CANCELLED, wanted=Wanted.CANCEL)
        case "stop", Status.STOPPED:
            return Move()
        case "stop", Status.QUEUED | Status.PAUSED if has_checkpoint:
            # Only a worker can turn a checkpoint into a model, so the job runs once more, just to end well.
            return Move(status=Status.QUEUED if status is Status.PAUSED else None, wanted=Wanted.STOP)
        case "stop", Status.WAITING | Status.QUEUED | Status.PAUSED:
            return Move(status=Status.CANCELLED, wanted=Wanted.STOP, reason="stopped_before_any_checkpoint")
        case "pause", Status.PAUSED:
            return Move()
        case "pause", Status.QUEUED:
            return Move(status=Status.PAUSED, wanted=Wanted.PAUSE)
        case "resume", Status.PAUSED:
            return Move(status=Status.QUEUED, wanted=Wanted.RUN)
        case "resume", Status.QUEUED if wanted is Wanted.RUN:
            return Move()
        case _:
            raise _refusal(verb, status)


def _ask_worker(verb: Verb, status: Status, wanted: Wanted) -> Move:
    """A worker holds the job: only the wish can change, and a cancel is never taken back."""
    if verb == "cancel":
        return Move(wanted=Wanted.CANCEL)
    if wanted is Wanted.CANCEL:
        raise _refusal(verb, status, "It is being cancelled.")
    if verb == "stop":
        return Move(wanted=Wanted.STOP)
    if wanted is Wanted.STOP:
        raise _refusal(verb, status, "It is being stopped.")
    return Move(wanted=Wanted.PAUSE if verb == "pause" else Wanted.RUN)


def _refusal(verb: Verb, status: Status, why: str = "") -> Conflict:
    hint = " Use /retry to run it again as a new job." if status in TERMINAL else ""
    message = f"A job that is {status} cannot {verb}. {why}".strip() + hint
    return Conflict(message, code=f"cannot_{verb}", status=str(status))


def backoff_seconds(consecutive: int) -> float:
    """Seconds before the next attempt after `consecutive` system failures: 2, 4, 8 … 300."""
    return float(min(2 ** max(consecutive, 1), 300))


MAX_CONSECUTIVE_LOSSES = 3


def on_loss(wanted: Wanted, *, losses: int, attempt: int, max_attempts: int) -> Move:
    """Decide what becomes of a held job whose lease ran out.

    `losses` counts earlier losses in a row without a newer checkpoint. The wish of the user is honoured at once where
    no trainer is needed for it; a `stop` needs one more claim, because only a worker can publish the best model.
    """
    if wanted is Wanted.CANCEL:
        return Move(status=Status.CANCELLED, reason="cancelled")
    if losses + 1 >= MAX_CONSECUTIVE_LOSSES or attempt >= max_attempts:
        failure = Failure(
            fault="system",
            code="crash_loop" if losses + 1 >= MAX_CONSECUTIVE_LOSSES else "attempts_exhausted",
            message=f"The worker was lost {losses + 1} times in a row without a newer checkpoint (attempt {attempt} of "
            f"{max_attempts}).",
            hint="The job may need more memory than the worker has: try a smaller batch_size, then /retry.",
            phase="run",
        )
        return Move(status=Status.FAILED, failure=failure, counts_as_loss=True)
    if wanted is Wanted.PAUSE:
        return Move(status=Status.PAUSED, counts_as_loss=True)
    return Move(status=Status.QUEUED, reason="worker_lost", delay_seconds=0.0, counts_as_loss=True)


def on_failure(failure: Failure, *, losses: int, attempt: int, max_attempts: int) -> Move:
    """Decide what becomes of a held job whose attempt ended with `failure`: another attempt, or the end."""
    exhausted = losses + 1 >= MAX_CONSECUTIVE_LOSSES or attempt >= max_attempts
    if failure.fault != "system" or not failure.retryable or exhausted:
        return Move(status=Status.FAILED, failure=failure, counts_as_loss=failure.fault == "system")
    return Move(
        status=Status.QUEUED, reason="retrying", delay_seconds=backoff_seconds(losses + 1), counts_as_loss=True,
    )  # fmt: skip


def on_parent(parent: Status) -> Move:
    """Decide what becomes of a job that waits for another job's model, once that parent is terminal."""
    if parent in (Status.SUCCEEDED, Status.STOPPED):
        return Move(status=Status.QUEUED)
    failure = Failure(
        fault="user", code="parent_failed", message=f"The job whose model this one starts from ended {parent}.",
        hint="Start from a finished model, or retry the parent and submit this job again.", phase="wait",
    )  # fmt: skip
    return Move(status=Status.FAILED, failure=failure, reason="parent_failed")
