"""The life of a job: its states, who may move it where, and what a request, a loss or a failure leads to. Pure."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from app.domain.errors import Conflict, Failure


class Kind(StrEnum):
    """What a job is for; `internal` jobs (ingest, import, measuring) share the same life."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    APPLY = "apply"
    INTERNAL = "internal"


MEASURE = "measure"  # the recipe of the internal job that runs some steps of another


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

# Why a job that was asked to stop has no model to show for it.
STOPPED_TOO_EARLY = "stopped_before_any_checkpoint"

TRANSITIONS: dict[tuple[Status | None, Status], frozenset[Actor]] = {
    (None, Status.QUEUED): frozenset({Actor.API, Actor.WORKER}),  # a worker inserts the children of a job
    (None, Status.WAITING): frozenset({Actor.API, Actor.WORKER}),
    (Status.WAITING, Status.QUEUED): frozenset({Actor.WORKER, Actor.SWEEP}),
    (Status.WAITING, Status.FAILED): frozenset({Actor.WORKER, Actor.SWEEP}),
    (Status.QUEUED, Status.STARTING): frozenset({Actor.CLAIM}),
    (Status.STARTING, Status.RUNNING): frozenset({Actor.WORKER}),
    # WAITING: an orchestrating job hands its slot back while its children run.
    **{
        (held, end): frozenset({Actor.WORKER})
        for held in HELD
        for end in (Status.SUCCEEDED, Status.STOPPED, Status.WAITING)
    },
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

_WISH: dict[Verb, Wanted] = {
    "cancel": Wanted.CANCEL, "stop": Wanted.STOP, "pause": Wanted.PAUSE, "resume": Wanted.RUN,
}  # fmt: skip


def on_request(verb: Verb, status: Status, wanted: Wanted, *, has_checkpoint: bool) -> Move:
    """Decide what a user's verb does to a job.

    Asking twice is harmless: a verb whose end is already reached, or already on its way, changes nothing. A cancel is
    never taken back, a stop only by a cancel.

    Raises:
        Conflict: the verb makes no sense in this state; the error carries the current status.
    """
    if status in TERMINAL:
        # Only `resume` would undo an end. The other wishes, asked again, are the repeated call of a careful client.
        if verb != "resume" and wanted is _WISH[verb]:
            return Move()
        raise _refusal(verb, status)
    if verb == "cancel":
        return Move(wanted=Wanted.CANCEL, status=None if status in HELD else Status.CANCELLED)
    if wanted is Wanted.CANCEL:
        raise _refusal(verb, status, "It is being cancelled.")
    if verb == "stop":
        return _stop(status, has_checkpoint=has_checkpoint)
    if wanted is Wanted.STOP:
        raise _refusal(verb, status, "It is being stopped.")
    match verb, status:
        case _, Status.WAITING:
            raise _refusal(verb, status)
        case "pause", Status.QUEUED | Status.PAUSED:
            return Move(wanted=Wanted.PAUSE, status=Status.PAUSED if status is Status.QUEUED else None)
        case "resume", Status.QUEUED | Status.PAUSED:
            return Move(wanted=Wanted.RUN, status=Status.QUEUED if status is Status.PAUSED else None)
        case _:  # a worker holds it, and hears the wish in the answer to its heartbeat
            return Move(wanted=_WISH[verb])


def _stop(status: Status, *, has_checkpoint: bool) -> Move:
    """Only a worker can turn a checkpoint into a model, so a job that has one runs once more, just to end well."""
    if status in HELD:
        return Move(wanted=Wanted.STOP)
    if status is Status.WAITING or not has_checkpoint:
        return Move(wanted=Wanted.STOP, status=Status.CANCELLED, reason=STOPPED_TOO_EARLY)
    return Move(wanted=Wanted.STOP, status=Status.QUEUED if status is Status.PAUSED else None)


def _refusal(verb: Verb, status: Status, why: str = "") -> Conflict:
    verbed = {"cancel": "cancelled", "stop": "stopped", "pause": "paused", "resume": "resumed"}[verb]
    hint = "Use /retry to run it again as a new job." if status in TERMINAL else ""
    message = " ".join(part for part in (f"A job that is {status} cannot be {verbed}.", why, hint) if part)
    return Conflict(message, code=f"cannot_{verb}", status=str(status))


def backoff_seconds(consecutive: int) -> float:
    """Seconds before the next attempt after `consecutive` system failures: 2, 4, 8 … 256, then 300."""
    return float(min(2 ** min(max(consecutive, 1), 9), 300))


MAX_CONSECUTIVE_LOSSES = 3


def on_finish(outcome: Status, wanted: Wanted) -> Move:
    """Decide where a job goes whose worker reports `outcome` (any status that `WORKER` may move a held job to).

    `wanted` is read under the row's lock in the transaction that commits the end: a cancel accepted before it always
    wins, and a resume or stop that came while the worker was pausing is not lost.
    """
    if wanted is Wanted.CANCEL:
        return Move(status=Status.CANCELLED)
    if outcome is Status.PAUSED and wanted is not Wanted.PAUSE:
        return Move(status=Status.QUEUED, reason="resumed")
    if outcome is Status.WAITING and wanted is Wanted.PAUSE:
        return Move(status=Status.PAUSED)
    if outcome is Status.WAITING and wanted is Wanted.STOP:
        return Move(status=Status.QUEUED, reason="stopping")  # no further round: it makes the best of what is there
    return Move(status=outcome)


def on_release(wanted: Wanted, *, has_checkpoint: bool) -> Move:
    """Decide where a held job goes that a draining worker hands back; nothing is counted against it."""
    return _idle(wanted, has_checkpoint=has_checkpoint) or Move(status=Status.QUEUED, reason="drained")


def on_loss(wanted: Wanted, *, losses: int, attempts: int, max_attempts: int, has_checkpoint: bool) -> Move:
    """Decide what becomes of a held job whose lease ran out.

    `losses` counts earlier losses in a row without a newer checkpoint, `attempts` the attempts so far without those
    that ended in a drain or a pause. The user's wish is honoured at once where no trainer is needed for it.
    """
    if wanted is Wanted.CANCEL:
        return Move(status=Status.CANCELLED)
    if _exhausted(losses, attempts, max_attempts):
        in_a_row = losses + 1 >= MAX_CONSECUTIVE_LOSSES
        failure = Failure(
            fault="system", code="crash_loop" if in_a_row else "attempts_exhausted",
            message=f"The worker was lost {losses + 1} times in a row without a newer checkpoint." if in_a_row
            else f"The worker was lost in the last of {max_attempts} attempts.",
            hint="It may need more memory than the worker has: submit it again with a smaller training.batch_size.",
            phase="run",
        )  # fmt: skip
        return Move(status=Status.FAILED, failure=failure, counts_as_loss=True)
    idle = _idle(wanted, has_checkpoint=has_checkpoint) or Move(status=Status.QUEUED, reason="worker_lost")
    return replace(idle, counts_as_loss=True)


def on_failure(
    failure: Failure, wanted: Wanted, *, losses: int, attempts: int, max_attempts: int, has_checkpoint: bool
) -> Move:
    """Decide what becomes of a held job whose attempt ended with `failure`: another attempt, or the end.

    The counts are those of `on_loss`. A cancel accepted before the failure is committed wins over it.
    """
    if wanted is Wanted.CANCEL:
        return Move(status=Status.CANCELLED)
    counts = failure.fault == "system"
    if not counts or not failure.retryable or _exhausted(losses, attempts, max_attempts):
        return Move(status=Status.FAILED, failure=failure, counts_as_loss=counts)
    retry = Move(status=Status.QUEUED, reason="retrying", delay_seconds=backoff_seconds(losses + 1))
    return replace(
        _idle(wanted, has_checkpoint=has_checkpoint) or retry, failure=failure, counts_as_loss=True,
    )  # fmt: skip


def _exhausted(losses: int, attempts: int, max_attempts: int) -> bool:
    return losses + 1 >= MAX_CONSECUTIVE_LOSSES or attempts >= max_attempts


def _idle(wanted: Wanted, *, has_checkpoint: bool) -> Move | None:
    """Honour a wish that needs no worker, once no worker holds the job; None is to go on."""
    if wanted is Wanted.CANCEL:
        return Move(status=Status.CANCELLED)
    if wanted is Wanted.PAUSE:
        return Move(status=Status.PAUSED)
    if wanted is Wanted.STOP and not has_checkpoint:
        return Move(status=Status.CANCELLED, reason=STOPPED_TOO_EARLY)
    return None


def on_parent(parent: Status, *, made_model: bool = True) -> Move:
    """Decide what becomes of a job that waits for another job's model, once that parent is terminal."""
    if parent in (Status.SUCCEEDED, Status.STOPPED) and made_model:
        return Move(status=Status.QUEUED)
    how = f"ended {parent}" if parent in (Status.FAILED, Status.CANCELLED) else "made no model"
    failure = Failure(
        fault="user", code="parent_failed", message=f"The job whose model this one starts from {how}.",
        hint="Start from a finished model, or retry the parent and submit this job again.", phase="wait",
    )  # fmt: skip
    return Move(status=Status.FAILED, failure=failure, reason="parent_failed")
