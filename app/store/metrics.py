"""The numbers of a job, one per name and step. There may be ten million: they are thinned by the database."""

import math
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import and_, delete, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.store import tables

Row = tuple[str, int, float | None]  # name, step, value
Points = list[tuple[int, float | None]]  # step, value

_METRIC = tables.Metric


def write(session: Session, job: tables.Job, rows: Iterable[Row], attempt: int) -> dict[str, tuple[int, float | None]]:
    """Write numbers; of two for the same name and step the newest attempt's stays, and of one attempt's the last.

    Values that are not finite are stored as null. Returns the latest step and value of every name written.
    """
    values = {(name, step): _finite(value) for name, step, value in rows}
    if not values:
        return {}
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(_METRIC)
    session.connection().execute(  # below the ORM: one prepared statement for the whole flush
        statement.on_conflict_do_update(
            index_elements=["job_id", "name", "step"],
            set_={"value": statement.excluded.value, "attempt": statement.excluded.attempt},
            where=_METRIC.attempt <= statement.excluded.attempt,
        ),
        [
            {"job_id": job.id, "name": name, "step": step, "value": value, "attempt": attempt}
            for (name, step), value in values.items()
        ],
    )
    latest: dict[str, tuple[int, float | None]] = {}
    for (name, step), value in values.items():
        if name not in latest or step >= latest[name][0]:
            latest[name] = (step, value)
    return latest


def forget_after(session: Session, job_id: str, step: int) -> None:
    """Forget what an earlier attempt wrote beyond the checkpoint that this one starts from: it is about to be redone.

    Without this, a resumed run that ends sooner would keep numbers of steps that its model never saw.
    """
    session.execute(delete(_METRIC).where(_METRIC.job_id == job_id, _METRIC.step > step))


def read(
    session: Session, job_id: str, names: Sequence[str] | None, after_step: int | None, max_points: int
) -> Mapping[str, Points]:
    """Give the numbers of a job by name, in order of steps, at most `max_points` (but never fewer than five) of each.

    A longer series keeps its first and last point and, of each of equally long stretches of steps, the smallest and the
    largest value, and the first null: so no peak and no gap is thinned away. `names` of None means all.
    """
    wanted = [_METRIC.job_id == job_id]
    if names is not None:
        wanted.append(_METRIC.name.in_(names))
    if after_step is not None:
        wanted.append(_METRIC.step > after_step)
    series = session.execute(
        select(_METRIC.name, func.count(), func.count(_METRIC.value), func.min(_METRIC.step), func.max(_METRIC.step))
        .where(*wanted)
        .group_by(_METRIC.name)
        .order_by(_METRIC.name)
    ).all()
    return {
        name: _whole(session, job_id, name, after_step)
        if count <= max(max_points, 5)
        else _thinned(session, job_id, name, first, last, max(max_points, 5), has_nulls=count > finite)
        for name, count, finite, first, last in series
    }


def _whole(session: Session, job_id: str, name: str, after_step: int | None) -> Points:
    points = select(_METRIC.step, _METRIC.value).where(_METRIC.job_id == job_id, _METRIC.name == name)
    if after_step is not None:
        points = points.where(_METRIC.step > after_step)
    return [(step, value) for step, value in session.execute(points.order_by(_METRIC.step))]


def _thinned(
    session: Session, job_id: str, name: str, first: int, last: int, max_points: int, *, has_nulls: bool
) -> Points:
    stretches = (max_points - 2) // (3 if has_nulls else 2)
    stretch = ((_METRIC.step - first) * stretches // (last - first + 1)).label("stretch")
    series = and_(_METRIC.job_id == job_id, _METRIC.name == name, _METRIC.step >= first)
    extremes = (
        select(stretch, func.min(_METRIC.value).label("low"), func.max(_METRIC.value).label("high"))
        .where(series)
        .group_by("stretch")
        .subquery()
    )
    # Every stretch gives at most three groups: its lowest value, its highest, and null; each with its first step.
    kept = session.execute(
        select(func.min(_METRIC.step), _METRIC.value)
        .join(extremes, extremes.c.stretch == stretch.element)
        .where(
            series,
            or_(_METRIC.value == extremes.c.low, _METRIC.value == extremes.c.high, _METRIC.value.is_(None)),
        )
        .group_by(extremes.c.stretch, _METRIC.value)
    ).all()
    ends = session.execute(select(_METRIC.step, _METRIC.value).where(series, _METRIC.step.in_((first, last)))).all()
    return sorted({step: (step, value) for step, value in (*kept, *ends)}.values())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
