"""Random lives of one job against the pure rules: what the shells do between two transactions, without them."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.domain.errors import Conflict, Failure
from app.domain.jobs import (
    HELD,
    MAX_CONSECUTIVE_LOSSES,
    TERMINAL,
    Actor,
    Move,
    Status,
    Verb,
    Wanted,
    on_failure,
    on_finish,
    on_loss,
    on_parent,
    on_release,
    on_request,
    permitted,
)  # fmt: skip

# A busy machine is no defect of the code.
BUSY = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

pytestmark = pytest.mark.unit

FAULTS = st.sampled_from(["user", "data", "resource", "system"])
MAX_ATTEMPTS = 5


class Life(RuleBasedStateMachine):
    """One job. Each rule is one transaction of somebody."""

    @initialize(waits=st.booleans())
    def insert(self, waits: bool) -> None:
        self.status = Status.WAITING if waits else Status.QUEUED
        assert permitted(None, self.status, Actor.API)
        self.wanted = Wanted.RUN
        self.attempts = self.losses = 0
        self.has_checkpoint = self.cancel_accepted = False
        self.ends: list[Status] = []

    def apply(self, move: Move, actor: Actor) -> None:
        if move.wanted is not None:
            self.wanted = move.wanted
        if move.counts_as_loss:
            self.losses += 1
        if move.status is None:
            return
        assert permitted(self.status, move.status, actor), (self.status, move, actor)
        if self.status in HELD and self.cancel_accepted:
            assert move.status in (Status.CANCELLED, Status.RUNNING), "a cancel accepted before the end always wins"
        self.status = move.status
        if move.status in TERMINAL:
            self.ends.append(move.status)

    @rule(verb=st.sampled_from(["cancel", "stop", "pause", "resume"]))
    def user(self, verb: Verb) -> None:
        before = self.status
        try:
            move = on_request(verb, self.status, self.wanted, has_checkpoint=self.has_checkpoint)
        except Conflict:
            assert not (verb == "cancel" and before not in TERMINAL), "a cancel is refused only at the end"
            return
        self.apply(move, Actor.API)
        self.cancel_accepted |= verb == "cancel" and before not in TERMINAL

    @precondition(lambda self: self.status is Status.WAITING)
    @rule(end=st.sampled_from(sorted(TERMINAL)), made_model=st.booleans())
    def parent_ends(self, end: Status, made_model: bool) -> None:
        self.apply(on_parent(end, made_model=made_model), Actor.SWEEP)

    @precondition(lambda self: self.status is Status.QUEUED)
    @rule()
    def claim(self) -> None:
        self.apply(Move(status=Status.STARTING), Actor.CLAIM)
        self.attempts += 1

    @precondition(lambda self: self.status is Status.STARTING)
    @rule()
    def begin(self) -> None:
        self.apply(Move(status=Status.RUNNING), Actor.WORKER)

    @precondition(lambda self: self.status is Status.RUNNING)
    @rule()
    def checkpoint(self) -> None:
        self.has_checkpoint, self.losses = True, 0

    @precondition(lambda self: self.status in HELD)
    @rule(outcome=st.sampled_from([Status.SUCCEEDED, Status.STOPPED, Status.CANCELLED, Status.PAUSED, Status.WAITING]))
    def finish(self, outcome: Status) -> None:
        self.apply(on_finish(outcome, self.wanted), Actor.WORKER)
        self.attempts -= self.status not in TERMINAL  # not counted

    @precondition(lambda self: self.status in HELD)
    @rule()
    def drain(self) -> None:
        self.apply(on_release(self.wanted, has_checkpoint=self.has_checkpoint), Actor.WORKER)
        self.attempts -= self.status not in TERMINAL

    @precondition(lambda self: self.status in HELD)
    @rule(fault=FAULTS, retryable=st.booleans())
    def fail(self, fault: str, retryable: bool) -> None:
        failure = Failure.model_validate({"fault": fault, "code": "x", "message": "x", "retryable": retryable})
        move = on_failure(
            failure, self.wanted, losses=self.losses, attempts=self.attempts, max_attempts=MAX_ATTEMPTS,
            has_checkpoint=self.has_checkpoint,
        )  # fmt: skip
        self.apply(move, Actor.WORKER)

    @precondition(lambda self: self.status in HELD)
    @rule()
    def lose(self) -> None:
        move = on_loss(
            self.wanted, losses=self.losses, attempts=self.attempts, max_attempts=MAX_ATTEMPTS,
            has_checkpoint=self.has_checkpoint,
        )  # fmt: skip
        self.apply(move, Actor.SWEEP)

    @invariant()
    def terminal_absorbs(self) -> None:
        if hasattr(self, "ends"):
            assert len(self.ends) <= 1
            assert (self.status in TERMINAL) is bool(self.ends)

    @invariant()
    def patience_ends(self) -> None:
        if hasattr(self, "ends"):
            assert self.losses <= MAX_CONSECUTIVE_LOSSES
            assert self.attempts <= MAX_ATTEMPTS
            if self.status is Status.QUEUED:
                assert self.losses < MAX_CONSECUTIVE_LOSSES
                assert self.attempts < MAX_ATTEMPTS

    @invariant()
    def wishes_are_kept(self) -> None:
        if not hasattr(self, "ends"):
            return
        if self.cancel_accepted:
            assert self.wanted is Wanted.CANCEL
            assert self.status in HELD | {Status.CANCELLED}
        if self.status is Status.PAUSED:
            assert self.wanted is Wanted.PAUSE
        if self.status is Status.QUEUED:
            assert self.wanted in (Wanted.RUN, Wanted.STOP)


Life.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=BUSY)
TestLife = Life.TestCase
