"""The supervisor's end of the wire, against a bare socket: what it kills for, and when it lets go."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import worker.supervisor.wire
from tests.waiting import Clock, until
from worker.report import Event, Finished, Metrics, Planned, Progress, Wish
from worker.supervisor.server import KILLED, Trainer
from worker.supervisor.wire import Wire

pytestmark = pytest.mark.unit


class Puppet(Trainer):
    """A trainer without a process; a kill ends it at once, as the zygote would tell."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        super().__init__(0, ours)
        self.theirs.settimeout(60)
        self.holds_on = False  # somebody else keeps its socket open

    def kill(self) -> None:
        if self.code is None:
            self.end(KILLED)

    def end(self, code: int) -> None:
        if not self.holds_on:
            self.theirs.close()
        self.ended(code)

    def say(self, *messages: Any) -> None:
        self.theirs.sendall(b"".join(message.model_dump_json().encode() + b"\n" for message in messages))


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    puppet = Puppet()
    yield puppet
    puppet.theirs.close()


@pytest.fixture
def wire(puppet: Puppet, tmp_path: Path) -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def make(
        *, wish: Callable[[], Wish] = lambda: "run", confirmed: Callable[[], float] = time.monotonic,
        progress_seconds: float = 60.0, fence_seconds: float = 60.0,
    ) -> Wire:  # fmt: skip
        made.append(
            Wire(
                puppet, wish=wish, confirmed=confirmed, fence_seconds=fence_seconds, progress_seconds=progress_seconds,
                log_file=tmp_path / "log",
            )
        )  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


def all_said(wire: Wire) -> list[Any]:
    said: list[Any] = []
    while (batch := wire.reports.get(timeout=60)) is not None:
        said += batch
    return said


class Looks:
    """Counts the ticks, each of which is followed by a look at the clocks."""

    def __init__(self) -> None:
        self.count = 0

    def wish(self) -> Wish:
        self.count += 1
        return "run"

    def await_one(self, wire: Wire) -> None:
        """Have the wire look at its clocks as they are now, and wait until it has."""
        for _ in range(3):  # the first may have begun before, and the third says that the second is over
            before = self.count
            wire.poke()
            until(lambda: self.count > before)  # noqa: B023


def test_reports_arrive_in_order_however_they_are_cut(puppet: Puppet, wire: Callable[..., Wire]) -> None:
    one = wire()
    reports = [Planned(plan={}, fingerprint={}), *(Metrics(rows=(("train/loss", step, 0.5),)) for step in range(500))]
    data = b"".join(report.model_dump_json().encode() + b"\n" for report in reports)
    for start in range(0, len(data), 997):
        puppet.theirs.sendall(data[start : start + 997])
    puppet.say(Finished(outcome="succeeded"))
    puppet.end(0)
    assert all_said(one) == [*reports, Finished(outcome="succeeded")]
    assert one.verdict is None


def test_ticks_carry_what_is_wanted_and_a_poke_hurries_them(
    puppet: Puppet, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.supervisor.wire, "TICK_SECONDS", 1000.0)
    wanted: list[Wish] = ["run"]
    one = wire(wish=lambda: wanted[0], fence_seconds=8000.0)
    with puppet.theirs.makefile("rb") as lines:
        assert json.loads(lines.readline()) == {"type": "tick", "wanted": "run"}
        wanted[0] = "pause"
        one.poke()
        assert json.loads(lines.readline()) == {"type": "tick", "wanted": "pause"}  # or times out, as it would unasked
        one.go()
        assert json.loads(lines.readline()) == {"type": "go"}


def test_a_line_without_an_end_is_no_report(
    puppet: Puppet, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.supervisor.wire, "LINE_BYTES", 1000)
    one = wire()
    puppet.theirs.sendall(b"x" * 2000)
    until(lambda: one.verdict == "protocol")
    assert all_said(one) == []


def test_a_stray_child_that_holds_the_socket_does_not_hold_the_run(puppet: Puppet, wire: Callable[..., Wire]) -> None:
    one = wire(fence_seconds=1.0)
    puppet.holds_on = True
    puppet.say(Event(code="last", message="words"))
    puppet.end(0)
    assert [report.code for report in all_said(one)] == ["last"]


def test_the_fence_kills_without_any_help(puppet: Puppet, wire: Callable[..., Wire]) -> None:
    last = time.monotonic()
    one = wire(confirmed=lambda: last, fence_seconds=0.3)
    until(lambda: puppet.code == KILLED)
    assert one.verdict == "fenced"


def test_the_same_progress_again_and_again_is_none(puppet: Puppet, wire: Callable[..., Wire]) -> None:
    one = wire(progress_seconds=0.4, fence_seconds=1.0)
    began = time.monotonic()
    while puppet.code is None and time.monotonic() - began < 60:
        try:
            puppet.say(Progress(phase="train", fraction=0.5, step=7), Event(code="still", message="here"))
        except OSError:
            break
        time.sleep(0.02)
    assert one.verdict == "hung"


def test_progress_that_moves_is_enough(
    puppet: Puppet, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = Clock(), Looks()
    monkeypatch.setattr(worker.supervisor.wire, "time", clock)
    one = wire(wish=looks.wish, confirmed=clock.monotonic, progress_seconds=0.5)
    for step in range(5):
        puppet.say(Progress(phase="train", fraction=step / 50, step=step))
        assert one.reports.get(timeout=60)
        clock.now += 0.4
        looks.await_one(one)
    assert puppet.code is None
    assert one.verdict is None
    clock.now += 0.2  # without any it is too long
    one.poke()
    until(lambda: puppet.code == KILLED)
    assert one.verdict == "hung"


def test_after_the_last_word_no_clock_kills_but_the_fence(
    puppet: Puppet, wire: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, last, looks = Clock(), Clock(), Looks()
    monkeypatch.setattr(worker.supervisor.wire, "time", clock)
    one = wire(wish=looks.wish, confirmed=last.monotonic, progress_seconds=0.2, fence_seconds=10.0)
    puppet.say(Finished(outcome="succeeded"))
    assert one.reports.get(timeout=60)
    one.kill_at(clock.now + 0.2, "drained")
    clock.now += 5.0
    looks.await_one(one)
    assert puppet.code is None
    assert one.verdict is None
    clock.now += 6.0
    one.poke()
    until(lambda: puppet.code == KILLED)
    assert one.verdict == "fenced"


def test_the_earliest_deadline_counts(puppet: Puppet, wire: Callable[..., Wire]) -> None:
    one = wire()
    one.kill_at(time.monotonic() + 0.2, "drained")
    one.kill_at(time.monotonic() + 600, "cancelled")
    until(lambda: puppet.code == KILLED)
    assert one.verdict == "drained"
