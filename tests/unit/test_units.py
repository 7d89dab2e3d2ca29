"""Numbers as people read them."""

from datetime import UTC, datetime

import pytest

from app.commands import units

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("count", "said"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (999_999, "1.0 MB"),
     (250_000_000, "250 MB"), (53_687_091_200, "53.7 GB"), (7e15, "7.0 PB"), (7e18, "7000 PB")],
)  # fmt: skip
def test_sizes(count: float | None, said: str) -> None:
    assert units.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11_100, "3:05:00"), (183_600, "2 d 3 h"),
     (-3, "0:00")],
)  # fmt: skip
def test_durations(seconds: float | None, said: str) -> None:
    assert units.duration(seconds) == said


@pytest.mark.parametrize(
    ("moment", "said"),
    [(None, "-"), ("2026-11-22T11:59:58Z", "just now"), ("2026-11-22T11:59:30Z", "30 s ago"),
     ("2026-11-22T11:55:00Z", "5 min ago"), ("2026-11-21T12:00:00Z", "24 h ago"), ("2026-11-18T12:00:00Z", "4 d ago"),
     ("2026-01-02T12:00:00Z", "2026-01-02")],
)  # fmt: skip
def test_ages(moment: str | None, said: str) -> None:
    assert units.age(moment, datetime(2026, 11, 22, 12, tzinfo=UTC)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (0.987654, "0.9877"), (1_234_567, "1,234,567"), (2048.0, "2,048"), (0.0, "0"), (1e-7, "1e-07")],
)
def test_numbers(value: float | None, said: str) -> None:
    assert units.number(value) == said
