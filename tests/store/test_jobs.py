"""Jobs as the API sees them: their place in the queue, who could run them, how many a project may have."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy import event as sqlalchemy_event

from app.domain.errors import TooManyRequests
from app.domain.jobs import Status
from app.store import datasets, jobs, migrate, models, tables, workers
from app.store.clock import Now
from app.store.ids import new_id
from app.store.page import Page
from app.store.session import make_engine, transaction
from tests import factories

pytestmark = pytest.mark.store


def new_job(project_id: str) -> tables.Job:
    return tables.Job(
        id=new_id("job"), project_id=project_id, name="n", recipe="r", recipe_version="1", kind="finetune",
        status="queued", spec={},
    )  # fmt: skip


def test_the_queue_goes_by_priority_then_age_and_leaves_out_who_must_wait(engine: Engine) -> None:
    with transaction(engine) as session:
        project = factories.make_project(session)
        # A priority of our own, above what other tests use.
        old, young = (factories.make_job(session, project, priority=1000) for _ in range(2))
        urgent = factories.make_job(session, project, priority=1001)
        later = factories.make_job(session, project, priority=1002, not_before=4e9)
        internal = factories.make_job(session, project, priority=1002, internal=True, kind="internal")
        held = factories.bring(session, factories.make_job(session, project, priority=1002), Status.RUNNING)
        everyone = [old, young, urgent, later, internal, held]
        around = jobs.surroundings(session, everyone, alive_seconds=30)
        assert [around[job.id].position for job in (urgent, old, young)] == [1, 2, 3]
        assert around[later.id].position == 1  # its turn comes first once its time has come
        assert around[internal.id].position == 1  # internal jobs stand in a queue of their own
        assert around[held.id].position is None
        for job in everyone:
            job.status, job.lease_owner, job.lease_expires_at = "cancelled", None, None


def test_looking_around_a_page_costs_the_same_whatever_its_length(engine: Engine) -> None:
    with transaction(engine) as session:
        project = factories.make_project(session)
        made = [factories.make_job(session, project) for _ in range(12)]
        statements: list[str] = []

        def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        sqlalchemy_event.listen(engine, "before_cursor_execute", count)
        try:
            jobs.surroundings(session, made[:1], alive_seconds=30)
            one = len(statements)
            jobs.surroundings(session, made, alive_seconds=30)
        finally:
            sqlalchemy_event.remove(engine, "before_cursor_execute", count)
        assert len(statements) == 2 * one


@pytest.mark.parametrize(
    ("device", "gpus", "offered", "fits"),
    [
        ("cpu", 1, 0, True),
        ("auto", 1, 0, True),
        ("auto", 2, 0, False),
        ("auto", 2, 2, True),
        ("cuda", 1, 0, False),
        ("cuda", 1, 1, True),
        ("cuda", 3, 2, False),
    ],
)
def test_whether_a_worker_fits(device: str, gpus: int, offered: int, fits: bool) -> None:
    assert jobs._fits(tables.Job(device=device, gpus=gpus), offered) is fits


def test_only_workers_that_live_and_take_jobs_count(engine: Engine) -> None:
    job = tables.Job(device="cuda", gpus=40)

    def offer(name: str, draining: bool, age: float) -> bool:
        with transaction(engine) as session:
            workers.beat(
                session, name, host="h", slots=1, busy=0, gpus=[{}] * 40, versions={}, draining=draining
            )  # fmt: skip
            session.get_one(tables.Worker, name).heartbeat_at = session.scalar(select(Now() - age)) or 0.0
            session.flush()
            found = not jobs.doubts(session, job, alive_seconds=30)
            workers.leave(session, name)
            return found

    assert offer("alive", draining=False, age=1)
    assert not offer("draining", draining=True, age=1)
    assert not offer("silent", draining=False, age=31)


def test_the_limit_holds_for_many_who_submit_at_once(engine: Engine) -> None:
    with transaction(engine) as session:
        project_id = factories.make_project(session).id

    def submit(_: int) -> bool:
        try:
            with transaction(engine) as session:
                jobs.insert(session, new_job(project_id), max_queued_jobs=5)
        except TooManyRequests:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(submit, range(16))) == 5
    with transaction(engine) as session:
        mine = select(func.count()).select_from(tables.Job).where(tables.Job.project_id == project_id)
        assert session.scalar(mine) == 5
        for job in session.scalars(select(tables.Job).where(tables.Job.project_id == project_id)):
            factories.bring(session, job, Status.CANCELLED)
        jobs.insert(session, new_job(project_id), max_queued_jobs=1)  # only unfinished ones count


def test_metadata_filters_match_whole_pairs(engine: Engine) -> None:
    with transaction(engine) as session:
        project = factories.make_project(session)
        odd = factories.make_job(session, project, meta={"a.b": "1", "ü [0]": "x'y"})
        factories.make_job(session, project, meta={"a": {"b": "1"}})

        def found(**pairs: str) -> list[str]:
            rows, _ = jobs.page_of(session, project.id, Page(), metadata=pairs)
            return [row.id for row in rows]

        assert found(**{"a.b": "1"}) == [odd.id]
        assert found(**{"ü [0]": "x'y"}) == [odd.id]
        assert found(**{"ü [0]": "x"}) == []
        assert len(found()) == 2


def test_pages_are_read_in_the_order_of_an_index(tmp_path: Path) -> None:
    """No page may cost a sort of everything that a project has: SQLite says how it would go about it."""
    url = f"sqlite:///{tmp_path / 'lists.db'}"
    migrate.upgrade(url)
    engine = make_engine(url)
    plans: list[str] = []

    def explain(connection: Any, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if " LIMIT " in statement and not statement.startswith("EXPLAIN"):
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            plans.append("; ".join(str(row[-1]) for row in rows))

    sqlalchemy_event.listen(engine, "before_cursor_execute", explain)
    page = Page(after="job_0")
    with transaction(engine) as session:
        jobs.page_of(session, "prj_x", page)
        jobs.page_of(session, "prj_x", page, statuses=["failed"])
        jobs.page_of(session, "prj_x", page, kind="internal", metadata={"a": "b"})
        models.page_of(session, "prj_x", page)
        datasets.read(session, "prj_x", page, name=None, metadata={})
    engine.dispose()
    assert len(plans) == 5
    assert not [plan for plan in plans if "TEMP B-TREE" in plan or "SCAN" in plan.replace("SCAN pair", "")]
