"""Numbers: which of two counts, and what a thinned series keeps."""

import itertools
import math
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from app.store import metrics, tables
from app.store.metrics import Row
from app.store.session import transaction
from tests.factories import make_job, make_project

pytestmark = pytest.mark.store

LOSS = "train/loss"


@pytest.fixture
def job(engine: Engine) -> tables.Job:
    with transaction(engine) as session:
        return make_job(session, make_project(session))


def write(
    engine: Engine, job: tables.Job, rows: Iterable[Row], attempt: int = 1
) -> dict[str, tuple[int, float | None]]:
    with transaction(engine) as session:
        return metrics.write(session, job, rows, attempt)


def read(engine: Engine, job: tables.Job, *, after: int | None = None, points: int = 500) -> metrics.Points:
    with transaction(engine, read_only=True) as session:
        return metrics.read(session, job.id, [LOSS], after, points).get(LOSS, [])


def test_the_latest_of_each_name_is_given_back(engine: Engine, job: tables.Job) -> None:
    rows = [(LOSS, 2, 1.0), (LOSS, 1, 2.0), ("lr", 1, 0.1), (LOSS, 2, 1.5)]
    assert write(engine, job, rows) == {LOSS: (2, 1.5), "lr": (1, 0.1)}
    assert read(engine, job) == [(1, 2.0), (2, 1.5)]
    assert write(engine, job, []) == {}


def test_the_newest_attempt_has_the_last_word(engine: Engine, job: tables.Job) -> None:
    write(engine, job, [(LOSS, 1, 1.0), (LOSS, 2, 1.0)], attempt=1)
    write(engine, job, [(LOSS, 2, 2.0), (LOSS, 3, 2.0)], attempt=2)
    write(engine, job, [(LOSS, 3, 1.0)], attempt=1)
    write(engine, job, [(LOSS, 2, 2.5)], attempt=2)
    assert read(engine, job) == [(1, 1.0), (2, 2.5), (3, 2.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_null(engine: Engine, job: tables.Job, value: float | None) -> None:
    write(engine, job, [(LOSS, 1, value)])
    assert read(engine, job) == [(1, None)]


def test_names_and_steps_are_filtered(engine: Engine, job: tables.Job) -> None:
    write(engine, job, [(name, step, float(step)) for name in (LOSS, "lr", "x") for step in range(5)])
    with transaction(engine, read_only=True) as session:
        every = metrics.read(session, job.id, None, None, 500)
        some = metrics.read(session, job.id, ["lr", "missing"], 2, 500)
    assert sorted(every) == sorted([LOSS, "lr", "x"])
    assert some == {"lr": [(3, 3.0), (4, 4.0)]}


def test_forgetting_is_for_one_job_and_what_lies_beyond(engine: Engine, job: tables.Job) -> None:
    with transaction(engine) as session:
        other = make_job(session, make_project(session))
    for one in (job, other):
        write(engine, one, [(LOSS, step, 0.0) for step in range(4)])
    with transaction(engine) as session:
        metrics.forget_after(session, job.id, 1)
    assert [step for step, _ in read(engine, job)] == [0, 1]
    assert [step for step, _ in read(engine, other)] == [0, 1, 2, 3]


def check_thinned(series: dict[int, float | None], thinned: metrics.Points, points: int) -> None:
    """Everything that a thinned series promises, against the whole one."""
    points = max(points, 5)
    assert len(thinned) <= points
    assert thinned == sorted(thinned)
    assert len({step for step, _ in thinned}) == len(thinned)
    assert all(series[step] == value for step, value in thinned)
    if len(series) <= points:
        assert dict(thinned) == series
    kept = dict(thinned)
    assert min(series) in kept
    assert max(series) in kept
    finite = [value for value in series.values() if value is not None]
    if finite:
        assert {min(finite), max(finite)} <= set(kept.values())
    if None in series.values():
        assert None in kept.values()


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    series=st.dictionaries(
        st.integers(0, 10**12), st.none() | st.integers(-3, 3).map(float) | st.floats(-1e300, 1e300), min_size=1,
        max_size=60,
    ),
    points=st.integers(0, 40),
)  # fmt: skip
def test_a_thinned_series_keeps_ends_extremes_and_gaps(
    engine: Engine, series: dict[int, float | None], points: int
) -> None:
    with transaction(engine) as session:
        job = make_job(session, make_project(session))
        metrics.write(session, job, [(LOSS, step, value) for step, value in series.items()], 1)
    check_thinned(series, read(engine, job, points=points), points)


def test_a_long_series_is_thinned_by_the_database(engine: Engine, job: tables.Job) -> None:
    series: dict[int, float | None] = {step: math.sin(step / 500) for step in range(20_000)}
    series[12_345] = 99.0
    series[777] = -99.0
    series[15_000] = None
    write(engine, job, [(LOSS, step, value) for step, value in series.items()])
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    event.listen(engine, "after_cursor_execute", count)
    thinned = read(engine, job, points=500)
    event.remove(engine, "after_cursor_execute", count)
    check_thinned(series, thinned, 500)
    assert len(thinned) > 300, "it should use what it may"
    assert (777, -99.0) in thinned
    assert (12_345, 99.0) in thinned
    # Every stretch of the curve is there, not only its ends.
    steps = [step for step, _ in thinned]
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) < 3 * 20_000 / 150
    assert statements <= 4


def test_a_part_of_a_long_series_is_thinned_alike(engine: Engine, job: tables.Job) -> None:
    series: dict[int, float | None] = {step: float(step % 17) for step in range(2000)}
    write(engine, job, [(LOSS, step, value) for step, value in series.items()])
    part = {step: value for step, value in series.items() if step > 999}
    check_thinned(part, read(engine, job, after=999, points=50), 50)


def test_a_constant_series_stays_small(engine: Engine, job: tables.Job) -> None:
    """Every row equals the extremes, so every row would be kept by a careless query."""
    write(engine, job, [(LOSS, step, 1.0) for step in range(3000)])
    assert len(read(engine, job, points=100)) <= 100


def test_a_series_with_many_gaps_stays_within_bounds(engine: Engine, job: tables.Job) -> None:
    series = {step: None if step % 3 == 0 else float(step % 17) for step in range(3000)}
    write(engine, job, [(LOSS, step, value) for step, value in series.items()])
    check_thinned(series, read(engine, job, points=50), 50)
