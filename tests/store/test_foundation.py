"""What the store stands on: the clock, ids, transactions, and the list of workers."""

import threading
import time

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from app.store import tables, workers
from app.store.clock import Now
from app.store.ids import new_id
from app.store.session import transaction
from tests.factories import make_job, make_project

pytestmark = pytest.mark.store


class TestClock:
    def test_it_tells_the_time_with_fractions(self, engine: Engine) -> None:
        with transaction(engine, read_only=True) as session:
            times = [session.scalar(select(Now())) for _ in range(20)]
        assert all(isinstance(moment, float) and abs(moment - time.time()) < 60 for moment in times)
        assert any(moment is not None and moment % 1 > 0 for moment in times)

    def test_it_moves_on_within_a_transaction(self, engine: Engine) -> None:
        """PostgreSQL's `now()` would stand still."""
        with transaction(engine, read_only=True) as session:
            first = session.scalar(select(Now()))
            time.sleep(0.02)
            second = session.scalar(select(Now()))
        assert first is not None
        assert second is not None
        assert second > first

    def test_rows_are_stamped_by_it(self, engine: Engine) -> None:
        with transaction(engine) as session:
            project_id = make_project(session).id
        with transaction(engine, read_only=True) as session:
            assert abs(session.get_one(tables.Project, project_id).created_at - time.time()) < 60


class TestIds:
    def test_they_sort_by_age_even_within_a_millisecond(self) -> None:
        ids = [new_id("job") for _ in range(5000)]
        assert ids == sorted(ids)
        assert len(set(ids)) == 5000

    def test_their_form(self) -> None:
        prefix, _, rest = new_id("ckpt").partition("_")
        assert prefix == "ckpt"
        assert len(rest) == 26
        assert not set(rest) - set("0123456789abcdefghjkmnpqrstvwxyz")

    def test_threads_get_different_ones(self) -> None:
        ids: list[str] = []
        threads = [threading.Thread(target=lambda: ids.extend(new_id("job") for _ in range(500))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(ids)) == 2000


class TestTransactions:
    def test_an_exception_rolls_everything_back(self, engine: Engine) -> None:
        name = new_id("prj")

        def fail() -> None:
            with transaction(engine) as session:
                make_project(session, name)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        with transaction(engine, read_only=True) as session:
            assert session.scalar(select(tables.Project).where(tables.Project.name == name)) is None

    def test_what_was_read_can_be_used_after_the_commit(self, engine: Engine) -> None:
        with transaction(engine) as session:
            job = make_job(session, make_project(session))
        assert (job.status, job.attempt, job.created_at > 1e9) == ("queued", 0, True)

    def test_a_reader_does_not_wait_for_a_writer(self, engine: Engine) -> None:
        with transaction(engine) as writer:
            project = make_project(writer)
            began = time.monotonic()
            with transaction(engine, read_only=True) as reader:
                assert reader.get(tables.Project, project.id) is None
            assert time.monotonic() - began < 10  # and not the 15 s for which SQLite waits for a lock

    def test_two_writers_take_turns(self, engine: Engine) -> None:
        """Nobody gets `database is locked`: a writer says so from the start and waits."""
        with transaction(engine) as session:
            project_id = make_project(session).id
        errors: list[BaseException] = []

        def rename() -> None:
            try:
                for _ in range(5):
                    with transaction(engine) as session:
                        project = session.get_one(tables.Project, project_id, with_for_update=True)
                        time.sleep(0.005)
                        project.deleted_at = (project.deleted_at or 0) + 1
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=rename) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        with transaction(engine, read_only=True) as session:
            assert session.get_one(tables.Project, project_id).deleted_at == 20

    def test_foreign_keys_are_enforced(self, engine: Engine) -> None:
        def insert() -> None:
            with transaction(engine) as session:
                session.execute(
                    text("insert into uploads (id, project_id, bytes, sha256, created_at) values ('u', 'x', 1, 'x', 1)")
                )

        with pytest.raises(DBAPIError):
            insert()


def test_none_in_a_json_column_is_null(engine: Engine) -> None:
    with transaction(engine) as session:
        job = make_job(session, make_project(session), plan=None, error=None)
        found = session.scalar(
            select(tables.Job.id).where(tables.Job.id == job.id, tables.Job.plan.is_(None), tables.Job.error.is_(None))
        )
        assert found == job.id


class TestWorkers:
    def _beat(self, engine: Engine, worker: str, *, busy: int = 0, draining: bool = False) -> None:
        with transaction(engine) as session:
            workers.beat(
                session, worker, host="here", slots=2, busy=busy, gpus=[{"name": "H200", "memory_bytes": 1}],
                versions={"torch": "2"}, draining=draining,
            )  # fmt: skip

    def _find(self, engine: Engine, worker: str) -> tuple[tables.Worker, float] | None:
        with transaction(engine, read_only=True) as session:
            return next((found for found in workers.every(session) if found[0].id == worker), None)

    def test_a_beat_says_what_a_worker_offers_now(self, engine: Engine) -> None:
        name = new_id("wrk")
        self._beat(engine, name)
        first = self._find(engine, name)
        assert first is not None
        self._beat(engine, name, busy=1, draining=True)
        second = self._find(engine, name)
        assert second is not None
        assert (second[0].busy, second[0].draining, second[0].slots) == (1, True, 2)
        assert second[0].started_at == first[0].started_at
        assert second[0].heartbeat_at > first[0].heartbeat_at
        assert 0 <= second[1] < 5

    def test_who_leaves_is_gone_and_who_is_silent_is_forgotten(self, engine: Engine) -> None:
        leaving, silent, living = (new_id("wrk") for _ in range(3))
        for name in (leaving, silent, living):
            self._beat(engine, name)
        with transaction(engine) as session:
            workers.leave(session, leaving)
            session.get_one(tables.Worker, silent).heartbeat_at = 1.0
        with transaction(engine) as session:
            workers.forget(session)
        assert self._find(engine, leaving) is None
        assert self._find(engine, silent) is None
        assert self._find(engine, living) is not None
