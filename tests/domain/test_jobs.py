"""The table of a job's life, cell by cell, and what every request, loss, failure and end leads to."""

import itertools
from typing import Any

import pytest

from app.domain.errors import Conflict, Failure
from app.domain.jobs import (
    HELD,
    MAX_CONSECUTIVE_LOSSES,
    STOPPED_TOO_EARLY,
    TERMINAL,
    TRANSITIONS,
    Actor,
    Move,
    Status,
    Verb,
    Wanted,
    backoff_seconds,
    on_failure,
    on_finish,
    on_loss,
    on_parent,
    on_release,
    on_request,
    permitted,
)  # fmt: skip

pytestmark = pytest.mark.unit

REFUSED = "409"
NOTHING = Move()
VERBS: tuple[Verb, ...] = ("cancel", "stop", "pause", "resume")

CANCEL = Move(status=Status.CANCELLED, wanted=Wanted.CANCEL)
END_WELL = Move(status=Status.QUEUED, wanted=Wanted.STOP)


def asks(wanted: Wanted) -> Move:
    return Move(wanted=wanted)


# For a job that runs on as it was submitted and has a checkpoint.
CELLS: dict[Status, tuple[Move | str, Move | str, Move | str, Move | str]] = {
    #                  cancel, stop, pause, resume
    Status.WAITING: (CANCEL, Move(status=Status.CANCELLED, wanted=Wanted.STOP, reason=STOPPED_TOO_EARLY), REFUSED,
                     REFUSED),
    Status.QUEUED: (CANCEL, asks(Wanted.STOP), Move(status=Status.PAUSED, wanted=Wanted.PAUSE), asks(Wanted.RUN)),
    Status.STARTING: (asks(Wanted.CANCEL), asks(Wanted.STOP), asks(Wanted.PAUSE), asks(Wanted.RUN)),
    Status.RUNNING: (asks(Wanted.CANCEL), asks(Wanted.STOP), asks(Wanted.PAUSE), asks(Wanted.RUN)),
    Status.PAUSED: (CANCEL, END_WELL, asks(Wanted.PAUSE), Move(status=Status.QUEUED, wanted=Wanted.RUN)),
    Status.SUCCEEDED: (REFUSED, REFUSED, REFUSED, REFUSED),
    Status.STOPPED: (REFUSED, REFUSED, REFUSED, REFUSED),
    Status.FAILED: (REFUSED, REFUSED, REFUSED, REFUSED),
    Status.CANCELLED: (REFUSED, REFUSED, REFUSED, REFUSED),
}  # fmt: skip


def ask(verb: Verb, status: Status, wanted: Wanted, *, has_checkpoint: bool = True) -> Move | str:
    try:
        return on_request(verb, status, wanted, has_checkpoint=has_checkpoint)
    except Conflict:
        return REFUSED


@pytest.mark.parametrize("status", Status)
def test_every_verb_in_every_status(status: Status) -> None:
    assert tuple(ask(verb, status, Wanted.RUN) for verb in VERBS) == CELLS[status]


@pytest.mark.parametrize("status", [Status.QUEUED, Status.PAUSED, Status.WAITING])
def test_a_stop_before_any_checkpoint_ends_cancelled(status: Status) -> None:
    move = on_request("stop", status, Wanted.RUN, has_checkpoint=False)
    assert move == Move(status=Status.CANCELLED, wanted=Wanted.STOP, reason=STOPPED_TOO_EARLY)


@pytest.mark.parametrize("status", sorted(HELD))
def test_a_worker_decides_what_a_stop_without_a_checkpoint_comes_to(status: Status) -> None:
    assert ask("stop", status, Wanted.RUN, has_checkpoint=False) == asks(Wanted.STOP)


@pytest.mark.parametrize(("status", "verb", "has_checkpoint"), list(itertools.product(Status, VERBS, (True, False))))
def test_asking_twice_is_harmless(status: Status, verb: Verb, has_checkpoint: bool) -> None:
    """What a verb changed, the same verb changes no more."""
    first = ask(verb, status, Wanted.RUN, has_checkpoint=has_checkpoint)
    if not isinstance(first, Move):
        return
    now, wanted = first.status or status, first.wanted or Wanted.RUN
    second = ask(verb, now, wanted, has_checkpoint=has_checkpoint)
    assert isinstance(second, Move)
    assert second.status is None
    assert second.wanted in (None, wanted)


@pytest.mark.parametrize("verb", ["cancel", "stop", "pause"])
@pytest.mark.parametrize("end", sorted(TERMINAL))
def test_a_wish_asked_again_after_the_end_is_harmless(end: Status, verb: Verb) -> None:
    wish = {"cancel": Wanted.CANCEL, "stop": Wanted.STOP, "pause": Wanted.PAUSE}[verb]
    assert ask(verb, end, wish) == NOTHING
    assert ask("resume", end, wish) == REFUSED


@pytest.mark.parametrize("status", [status for status in Status if status not in TERMINAL])
@pytest.mark.parametrize("verb", ["stop", "pause", "resume"])
def test_a_cancel_is_never_taken_back(status: Status, verb: Verb) -> None:
    assert ask(verb, status, Wanted.CANCEL) == REFUSED


@pytest.mark.parametrize("status", [Status.QUEUED, Status.STARTING, Status.RUNNING, Status.PAUSED])
@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_a_stop_is_taken_back_only_by_a_cancel(status: Status, verb: Verb) -> None:
    assert ask(verb, status, Wanted.STOP) == REFUSED
    assert ask("cancel", status, Wanted.STOP) in (CANCEL, asks(Wanted.CANCEL))


@pytest.mark.parametrize("status", [Status.QUEUED, Status.STARTING, Status.RUNNING])
def test_a_pause_can_be_taken_back_before_it_happened(status: Status) -> None:
    assert ask("resume", status, Wanted.PAUSE) == asks(Wanted.RUN)


@pytest.mark.parametrize(
    ("status", "verb", "wanted", "has_checkpoint"), list(itertools.product(Status, VERBS, Wanted, (True, False)))
)
def test_no_request_makes_a_move_that_the_table_forbids(
    status: Status, verb: Verb, wanted: Wanted, has_checkpoint: bool
) -> None:
    move = ask(verb, status, wanted, has_checkpoint=has_checkpoint)
    if isinstance(move, Move) and move.status is not None:
        assert permitted(status, move.status, Actor.API)


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(Conflict, match=r"succeeded cannot be paused\. Use /retry") as refusal:
        on_request("pause", Status.SUCCEEDED, Wanted.RUN, has_checkpoint=True)
    assert (refusal.value.code, refusal.value.facts) == ("cannot_pause", {"status": "succeeded"})
    with pytest.raises(Conflict, match=r"running cannot be resumed\. It is being cancelled\."):
        on_request("resume", Status.RUNNING, Wanted.CANCEL, has_checkpoint=True)


class TestTheTable:
    def test_no_terminal_state_has_an_exit(self) -> None:
        assert not [move for move in TRANSITIONS if move[0] in TERMINAL]

    def test_every_state_can_be_reached_and_left(self) -> None:
        assert {after for _, after in TRANSITIONS} == set(Status)
        assert {before for before, _ in TRANSITIONS} == {None, *Status} - TERMINAL

    def test_only_a_claim_starts_a_job(self) -> None:
        assert {(before, *actors) for (before, after), actors in TRANSITIONS.items() if after is Status.STARTING} == {
            (Status.QUEUED, Actor.CLAIM)
        }

    @pytest.mark.parametrize("before", sorted(HELD))
    @pytest.mark.parametrize("after", Status)
    def test_while_a_worker_holds_a_job_the_api_writes_no_status(self, before: Status, after: Status) -> None:
        assert not permitted(before, after, Actor.API)

    @pytest.mark.parametrize("before", [status for status in Status if status not in HELD])
    @pytest.mark.parametrize("after", [Status.SUCCEEDED, Status.STOPPED, Status.RUNNING])
    def test_only_a_held_job_runs_or_ends_well(self, before: Status, after: Status) -> None:
        assert not any(permitted(before, after, actor) for actor in Actor)

    @pytest.mark.parametrize("end", [Status.SUCCEEDED, Status.STOPPED, Status.WAITING])
    def test_a_sweep_never_ends_a_job_well(self, end: Status) -> None:
        assert not any(permitted(held, end, Actor.SWEEP) for held in HELD)


SYSTEM = Failure(fault="system", code="crash", message="It crashed.", retryable=True)
USER = Failure(fault="user", code="diverged", message="The loss is not finite.")


def fresh(**changes: Any) -> dict[str, Any]:
    """What is counted of a job in its first attempt."""
    return {"losses": 0, "attempts": 1, "max_attempts": 20, "has_checkpoint": True} | changes


class TestFinish:
    @pytest.mark.parametrize("outcome", [after for before, after in TRANSITIONS if before is Status.RUNNING])
    def test_a_cancel_wins_over_every_end(self, outcome: Status) -> None:
        assert on_finish(outcome, Wanted.CANCEL).status is Status.CANCELLED

    @pytest.mark.parametrize("wanted", [Wanted.RUN, Wanted.PAUSE, Wanted.STOP])
    @pytest.mark.parametrize("outcome", [Status.SUCCEEDED, Status.STOPPED, Status.CANCELLED])
    def test_nothing_else_does(self, outcome: Status, wanted: Wanted) -> None:
        assert on_finish(outcome, wanted) == Move(status=outcome)

    def test_a_pause_that_was_taken_back_goes_on(self) -> None:
        assert on_finish(Status.PAUSED, Wanted.PAUSE).status is Status.PAUSED
        assert on_finish(Status.PAUSED, Wanted.RUN).status is Status.QUEUED
        assert on_finish(Status.PAUSED, Wanted.STOP).status is Status.QUEUED

    def test_an_orchestrating_job_pauses_before_its_next_round(self) -> None:
        assert on_finish(Status.WAITING, Wanted.RUN).status is Status.WAITING
        assert on_finish(Status.WAITING, Wanted.PAUSE).status is Status.PAUSED
        assert on_finish(Status.WAITING, Wanted.STOP) == Move(status=Status.QUEUED, reason="stopping")


class TestWishesOfAJobThatIsNoLongerHeld:
    @pytest.mark.parametrize(
        ("wanted", "has_checkpoint", "status"),
        [
            (Wanted.RUN, True, Status.QUEUED),
            (Wanted.RUN, False, Status.QUEUED),
            (Wanted.PAUSE, True, Status.PAUSED),
            (Wanted.PAUSE, False, Status.PAUSED),
            (Wanted.STOP, True, Status.QUEUED),
            (Wanted.STOP, False, Status.CANCELLED),
            (Wanted.CANCEL, True, Status.CANCELLED),
            (Wanted.CANCEL, False, Status.CANCELLED),
        ],
    )
    def test_release_loss_and_failure_honour_them_alike(
        self, wanted: Wanted, has_checkpoint: bool, status: Status
    ) -> None:
        counts = fresh(has_checkpoint=has_checkpoint)
        assert on_release(wanted, has_checkpoint=has_checkpoint).status is status
        assert on_loss(wanted, **counts).status is status
        assert on_failure(SYSTEM, wanted, **counts).status is status

    def test_a_drain_is_not_counted_and_the_others_are(self) -> None:
        assert not on_release(Wanted.RUN, has_checkpoint=True).counts_as_loss
        assert on_loss(Wanted.RUN, **fresh()).counts_as_loss
        assert on_failure(SYSTEM, Wanted.RUN, **fresh()).counts_as_loss


class TestTheEndOfPatience:
    @pytest.mark.parametrize("losses", range(MAX_CONSECUTIVE_LOSSES + 2))
    def test_three_losses_in_a_row(self, losses: int) -> None:
        counts = fresh(losses=losses)
        fails = losses + 1 >= MAX_CONSECUTIVE_LOSSES
        loss, failure = on_loss(Wanted.RUN, **counts), on_failure(SYSTEM, Wanted.RUN, **counts)
        assert (loss.status is Status.FAILED) is fails
        assert (failure.status is Status.FAILED) is fails
        if fails:
            assert loss.failure is not None
            assert loss.failure.code == "crash_loop"
            assert failure.failure is SYSTEM

    @pytest.mark.parametrize("attempts", [19, 20, 21])
    def test_the_last_attempt(self, attempts: int) -> None:
        counts = fresh(attempts=attempts)
        loss = on_loss(Wanted.RUN, **counts)
        assert (loss.status is Status.FAILED) is (attempts >= 20)
        assert (on_failure(SYSTEM, Wanted.RUN, **counts).status is Status.FAILED) is (attempts >= 20)
        if attempts >= 20:
            assert loss.failure is not None
            assert loss.failure.code == "attempts_exhausted"

    @pytest.mark.parametrize("wanted", [Wanted.PAUSE, Wanted.STOP, Wanted.RUN])
    def test_a_poisonous_job_fails_whatever_else_is_wanted(self, wanted: Wanted) -> None:
        assert on_loss(wanted, **fresh(losses=2)).status is Status.FAILED

    def test_a_cancel_wins_over_it(self) -> None:
        assert on_loss(Wanted.CANCEL, **fresh(losses=2)).status is Status.CANCELLED
        assert on_failure(USER, Wanted.CANCEL, **fresh()).status is Status.CANCELLED

    @pytest.mark.parametrize(
        "failure",
        [
            USER,
            Failure(fault="data", code="invalid_data", message="m"),
            Failure(fault="resource", code="out_of_memory", message="m"),
            Failure(fault="user", code="odd", message="m", retryable=True),
            Failure(fault="system", code="final", message="m", retryable=False),
        ],
    )
    def test_only_a_retryable_system_failure_is_tried_again(self, failure: Failure) -> None:
        move = on_failure(failure, Wanted.RUN, **fresh())
        assert (move.status, move.failure) == (Status.FAILED, failure)
        assert move.counts_as_loss is (failure.fault == "system")

    def test_waiting_longer_each_time(self) -> None:
        assert [backoff_seconds(count) for count in (0, 1, 2, 3, 8, 9, 10_000)] == [2, 2, 4, 8, 256, 300, 300]
        move = on_failure(SYSTEM, Wanted.RUN, **fresh(losses=1))
        assert (move.status, move.delay_seconds, move.failure) == (Status.QUEUED, 4.0, SYSTEM)


class TestParents:
    @pytest.mark.parametrize("end", sorted(TERMINAL))
    @pytest.mark.parametrize("made_model", [True, False])
    def test_only_a_model_frees_the_jobs_that_wait_for_it(self, end: Status, made_model: bool) -> None:
        move = on_parent(end, made_model=made_model)
        if made_model and end in (Status.SUCCEEDED, Status.STOPPED):
            assert move == Move(status=Status.QUEUED)
        else:
            assert move.status is Status.FAILED
            assert move.failure is not None
            assert (move.failure.code, move.failure.fault, move.reason) == ("parent_failed", "user", "parent_failed")

    def test_the_message_says_what_was_missing(self) -> None:
        failed, empty = on_parent(Status.CANCELLED).failure, on_parent(Status.SUCCEEDED, made_model=False).failure
        assert failed is not None
        assert "ended cancelled" in failed.message
        assert empty is not None
        assert "made no model" in empty.message
