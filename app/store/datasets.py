"""Datasets: inserted with the job that ingests them, published once by it, read, deleted to a tombstone."""

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.domain.datasets import SPLITS, DatasetFacts, DatasetStatus, Shard
from app.domain.errors import Conflict, Failure
from app.domain.jobs import TERMINAL, Kind, Status
from app.store import jobs, owned, page, tables, uploads, versions
from app.store.clock import Now
from app.store.ids import new_id


class Made(Protocol):
    """What ingest made of an upload; the bytes of its shards are kept already."""

    @property
    def facts(self) -> DatasetFacts: ...
    @property
    def format(self) -> str: ...
    @property
    def report(self) -> tables.Json: ...
    @property
    def shards(self) -> Sequence[Shard]: ...


def insert(
    session: Session,
    project_id: str,
    *,
    name: str,
    upload: tables.Upload | None,
    builtin: str | None,
    task: str | None,
    on_error: str,
    metadata: dict[str, str],
    max_attempts: int,
    max_queued_jobs: int,
) -> tables.Dataset:
    """Insert a dataset that is being processed, under the next version of its name, and the job that does it."""
    dataset = tables.Dataset(
        id=new_id("ds"), project_id=project_id, status=DatasetStatus.PROCESSING, asked_task=task, on_error=on_error,
        upload_id=upload.id if upload else None, builtin=builtin, bytes=upload.bytes if upload else 0, meta=metadata,
        job_id=new_id("job"),
    )  # fmt: skip
    versions.insert(session, dataset, name)
    job = tables.Job(
        id=dataset.job_id, project_id=project_id, name=f"Ingest {name}"[:200], recipe="ingest", recipe_version="1",
        kind=Kind.INTERNAL, internal=True, dataset_id=dataset.id, status=Status.QUEUED, max_attempts=max_attempts,
        spec={
            "upload": dataset.upload_id, "builtin": builtin, "on_error": on_error, "task": task,
        },
    )  # fmt: skip
    jobs.insert(session, job, max_queued_jobs=max_queued_jobs)
    session.refresh(dataset)
    return dataset


def publish(session: Session, dataset_id: str, made: Made) -> None:
    """Make a dataset ready, in the transaction that ends its ingest job."""
    dataset = session.get_one(tables.Dataset, dataset_id, with_for_update=True, populate_existing=True)
    dataset.status, dataset.error = DatasetStatus.READY, None
    dataset.task, dataset.format, dataset.report = made.facts.task, made.format, made.report
    dataset.sha256, dataset.samples = made.facts.sha256, sum(made.facts.splits.values())
    dataset.bytes = sum(shard.bytes for shard in made.shards)
    dataset.facts = made.facts.model_copy(update={"id": dataset_id}).model_dump(mode="json", exclude={"shards"})
    session.add_all(
        tables.Shard(
            dataset_id=dataset_id, split=shard.split, index=shard.index, rows=shard.rows, bytes=shard.bytes,
            sha256=shard.sha256, thumbnails_bytes=shard.thumbnails_bytes, thumbnails_sha256=shard.thumbnails_sha256,
        )
        for shard in made.shards
    )  # fmt: skip
    session.flush()


def fail(session: Session, dataset_id: str, failure: Failure) -> None:
    """Say why a dataset could not be made."""
    session.execute(
        update(tables.Dataset)
        .where(tables.Dataset.id == dataset_id, tables.Dataset.status == DatasetStatus.PROCESSING)
        .values(status=DatasetStatus.FAILED, error=failure.to_json())
    )


def read(
    session: Session, project_id: str, wanted: page.Page, *, name: str | None, metadata: dict[str, str]
) -> tuple[list[tables.Dataset], bool]:
    """List the datasets of a project."""
    query = select(tables.Dataset).where(tables.Dataset.project_id == project_id, tables.Dataset.deleted_at.is_(None))
    if name is not None:
        query = query.where(tables.Dataset.name == name)
    return page.read(session, page.with_metadata(query, tables.Dataset.meta, metadata), tables.Dataset.id, wanted)


def progress(session: Session, datasets: Sequence[tables.Dataset]) -> dict[str, tables.Json | None]:
    """Give how far the ingest jobs of those datasets are that are still being processed, by the dataset's id."""
    by_job = {dataset.job_id: dataset.id for dataset in datasets if dataset.status == DatasetStatus.PROCESSING}
    rows = session.execute(select(tables.Job.id, tables.Job.progress).where(tables.Job.id.in_(by_job)))
    return {by_job[row[0]]: row[1] for row in rows} if by_job else {}


def shards(session: Session, dataset_id: str) -> list[tables.Shard]:
    """Give the shards in the order in which samples are numbered: train, validation, test."""
    rows = session.scalars(select(tables.Shard).where(tables.Shard.dataset_id == dataset_id)).all()
    return sorted(rows, key=lambda shard: ([*SPLITS].index(shard.split), shard.index))


def remove(session: Session, dataset_id: str, project_id: str) -> None:
    """Delete a dataset: its samples go, its id, name and digest stay, so that lineage stays true.

    Raises:
        NotFound: there is none.
        Conflict: a job that is not finished needs it.
    """
    dataset = owned.find(session, tables.Dataset, dataset_id, project_id, lock=True)
    needing = session.scalars(
        select(tables.Job.id).where(tables.Job.dataset_id == dataset_id, tables.Job.status.not_in(TERMINAL)).limit(1)
    ).first()
    if needing is not None:
        raise Conflict(
            f"The job {needing} needs this dataset; wait for it or cancel it first.", code="in_use",
            status=dataset.status, job=needing,
        )  # fmt: skip
    session.execute(delete(tables.Shard).where(tables.Shard.dataset_id == dataset_id))
    upload_id = dataset.upload_id
    session.execute(
        update(tables.Dataset)
        .where(tables.Dataset.id == dataset_id)
        .values(deleted_at=Now(), upload_id=None, facts=None, report=None, meta={})
    )
    if upload_id is not None:
        uploads.drop_unused(session, upload_id)
