"""Signs of life from work without steps."""

import pytest

from tests.worker.sets import Heard
from worker import ticker
from worker.report import Progress
from worker.ticker import Ticker

pytestmark = pytest.mark.unit


def test_at_most_one_message_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(ticker.time, "monotonic", lambda: now[0])
    heard = Heard()
    tick = Ticker(heard.reporter, "decode", fraction=0.25)
    for done in range(100):
        tick(done, 100)
        now[0] += 0.125
    told = heard.of(Progress)
    assert len(told) == 12
    assert {(message.phase, message.fraction, message.steps) for message in told} == {("decode", 0.25, 100)}
    assert told[0].step == 8
