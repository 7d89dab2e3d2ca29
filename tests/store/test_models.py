"""Models: one per job, versions without races, and none deleted from under a job."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, select

from app.domain.errors import Conflict, NotFound
from app.domain.jobs import Status
from app.domain.models import ModelConfig
from app.store import models, submit, tables
from app.store.session import transaction
from tests import factories

pytestmark = pytest.mark.store
CONFIG = ModelConfig(
    architecture={"architecture": "resnet18"}, task="image_classification", classes=("cat", "dog"), image_size=32,
    mean=(0.5,) * 3, std=(0.25,) * 3,
)  # fmt: skip


def test_models_of_one_name_published_at_once_get_one_version_each(engine: Engine) -> None:
    with transaction(engine) as session:
        project = factories.make_project(session)
        ids = [factories.make_job(session, project, name="same").id for _ in range(8)]

    def publish(job_id: str) -> str:
        with transaction(engine) as session:
            job = session.get_one(tables.Job, job_id)
            return models.publish(session, job, config=CONFIG, parameters=1, metrics={}, files=[])

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(publish, ids))
    with transaction(engine, read_only=True) as session:
        rows = session.scalars(select(tables.Model).where(tables.Model.id.in_(made))).all()
        assert sorted(row.version for row in rows) == list(range(1, 9))
        assert {row.job_id for row in rows} == set(ids)
        assert all(row.lineage["job"] == row.job_id for row in rows)


def test_a_rename_into_a_race_gets_a_version_of_its_own(engine: Engine) -> None:
    with transaction(engine) as session:
        project = factories.make_project(session)
        ids = [factories.make_model(session, project).id for _ in range(6)]

    def rename(model_id: str) -> int:
        with transaction(engine) as session:
            return models.change(
                session, project.id, model_id, name="new", visibility=None, tags=None, description=None
            ).version

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(rename, ids)) == [1, 2, 3, 4, 5, 6]


def test_a_model_is_either_deleted_or_started_from(engine: Engine) -> None:
    factories.publish_catalogue(engine)
    for _ in range(5):
        with transaction(engine) as session:
            project = factories.make_project(session)
            model, dataset = factories.make_model(session, project).id, factories.make_dataset(session, project).id
        together = threading.Barrier(2)

        def delete(project_id: str = project.id, model: str = model, together: threading.Barrier = together) -> bool:
            together.wait()
            try:
                with transaction(engine) as session:
                    models.remove(session, project_id, model)
            except Conflict:
                return False
            return True

        def start(
            project_id: str = project.id, model: str = model, dataset: str = dataset,
            together: threading.Barrier = together,
        ) -> bool:  # fmt: skip
            together.wait()
            body = {"recipe": "image_classification", "dataset": dataset, "model": model}
            try:
                with transaction(engine) as session:
                    submission = submit.prepare(session, project_id, body)
                    session.add(submission.job(project_id, max_attempts=1))
            except NotFound:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            deleted, started = pool.submit(delete), pool.submit(start)
            assert deleted.result() != started.result()


def test_a_parent_that_ends_while_a_child_is_submitted_is_never_missed(engine: Engine) -> None:
    factories.publish_catalogue(engine)
    for _ in range(5):
        with transaction(engine) as session:
            project = factories.make_project(session)
            dataset = factories.make_dataset(session, project).id
            parent = factories.bring(
                session, factories.make_job(session, project, spec={"model": {"architecture": "resnet18"}}),
                Status.RUNNING,
            ).id  # fmt: skip
        together = threading.Barrier(2)

        def finish(parent: str = parent, together: threading.Barrier = together) -> None:
            from app.domain.jobs import Actor
            from app.store import life

            together.wait()
            with transaction(engine) as session:
                job = life.lock(session, parent)
                assert job is not None
                job.model_id = models.publish(session, job, config=CONFIG, parameters=1, metrics={}, files=[])
                life.move(session, job, Status.SUCCEEDED, actor=Actor.WORKER)

        def start(
            project_id: str = project.id, parent: str = parent, dataset: str = dataset,
            together: threading.Barrier = together,
        ) -> str:  # fmt: skip
            from app.store import jobs

            together.wait()
            body = {"recipe": "image_classification", "dataset": dataset, "model": parent}
            with transaction(engine) as session:
                job = submit.prepare(session, project_id, body).job(project_id, max_attempts=1)
                jobs.insert(session, job, max_queued_jobs=10)
                return job.id

        with ThreadPoolExecutor(2) as pool:
            ended, started = pool.submit(finish), pool.submit(start)
            ended.result()
            child = started.result()
        with transaction(engine, read_only=True) as session:
            row = session.get_one(tables.Job, child)
            assert (row.status, row.base_model_id) == ("queued", session.get_one(tables.Job, parent).model_id)
