"""Models: published once by the job that made them, or brought in by an import; found, changed, deleted."""

from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from app.domain.errors import Conflict, NotFound
from app.domain.jobs import TERMINAL, Kind, Status
from app.domain.models import ModelConfig, ModelStatus
from app.store import jobs, owned, tables, uploads, versions
from app.store.clock import Now
from app.store.ids import new_id
from app.store.page import Page, read

MadeFile = tuple[str, int, str]  # name, bytes, sha256


def publish(
    session: Session,
    job: tables.Job,
    *,
    config: ModelConfig,
    parameters: int,
    metrics: tables.Json,
    files: Iterable[MadeFile],
) -> str:
    """Make the model of a job, or make the one ready that an import began; the bytes of its files are kept already.

    Belongs into the transaction that ends the job, so that a model exists exactly when its job succeeded.
    """
    model = session.scalar(select(tables.Model).where(tables.Model.job_id == job.id).with_for_update())
    if model is None:
        model = tables.Model(
            id=new_id("mdl"), project_id=job.project_id, job_id=job.id, status=ModelStatus.READY,
            lineage={
                "job": job.id, "dataset": job.dataset_id, "base_model": job.base_model_id, "recipe": job.recipe,
                "recipe_version": job.recipe_version,
            },
        )  # fmt: skip
        versions.insert(session, model, job.name)
    model.status, model.task, model.error = ModelStatus.READY, config.task, None
    model.config, model.parameters, model.metrics = config.model_dump(mode="json"), parameters, metrics
    session.add_all(
        tables.ModelFile(model_id=model.id, name=name, bytes=size, sha256=sha256) for name, size, sha256 in files
    )
    session.flush()
    return model.id


def begin_import(
    session: Session,
    project_id: str,
    upload: tables.Upload,
    *,
    name: str,
    tags: Sequence[str],
    description: str,
    spec: tables.Json,
    max_attempts: int,
    max_queued_jobs: int,
) -> tables.Model:
    """Insert a model that is being imported, and the internal job that checks its weights; `spec` describes them."""
    job = tables.Job(
        id=new_id("job"), project_id=project_id, name=f"Import {name}"[:200], recipe="import_model", recipe_version="1",
        kind=Kind.INTERNAL, internal=True, status=Status.QUEUED, spec=spec, max_attempts=max_attempts,
    )  # fmt: skip
    jobs.insert(session, job, max_queued_jobs=max_queued_jobs)
    model = tables.Model(
        id=new_id("mdl"), project_id=project_id, job_id=job.id, upload_id=upload.id, status=ModelStatus.PROCESSING,
        tags=list(tags), description=description,
        lineage={"job": job.id, "dataset": None, "base_model": None, "recipe": None, "recipe_version": None},
    )  # fmt: skip
    versions.insert(session, model, name)
    session.refresh(model)
    return model


def visible(session: Session, project_id: str, model_id: str, *, keep: bool = False) -> tables.Model | None:
    """Give a model that this project may read; `keep` holds off its deletion until the commit."""
    query = select(tables.Model).where(tables.Model.id == model_id, *_visible(project_id))
    if keep:
        query = query.with_for_update(read=True).execution_options(populate_existing=True)
    return session.scalar(query)


def _visible(project_id: str) -> tuple[ColumnElement[bool], ...]:
    return (
        tables.Model.deleted_at.is_(None),
        or_(tables.Model.project_id == project_id, tables.Model.visibility == "public"),
    )


def find(session: Session, project_id: str, model_id: str) -> tables.Model:
    """Give a model that this project may read.

    Raises:
        NotFound: there is none.
    """
    found = visible(session, project_id, model_id)
    if found is None:
        raise NotFound()
    return found


def page_of(
    session: Session,
    project_id: str,
    page: Page,
    *,
    name: str | None = None,
    task: str | None = None,
    visibility: str | None = None,
) -> tuple[list[tables.Model], bool]:
    """Give a page of the project's models; `visibility="public"` shows everybody's public ones."""
    query = select(tables.Model).where(tables.Model.deleted_at.is_(None))
    if visibility is not None:
        query = query.where(tables.Model.visibility == visibility)
    if visibility != "public":
        query = query.where(tables.Model.project_id == project_id)
    for column, value in ((tables.Model.name, name), (tables.Model.task, task)):
        if value is not None:
            query = query.where(column == value)
    return read(session, query, tables.Model.id, page)


def change(
    session: Session,
    project_id: str,
    model_id: str,
    *,
    name: str | None,
    visibility: str | None,
    tags: Sequence[str] | None,
    description: str | None,
) -> tables.Model:
    """Change what may be changed of a model of this project; null leaves a field as it is.

    A new name brings a new version: the next one of that name.
    """
    model = owned.find(session, tables.Model, model_id, project_id, lock=True)
    if name is not None and name != model.name:
        versions.insert(session, model, name)
    if visibility is not None:
        model.visibility = visibility
    if tags is not None:
        model.tags = list(tags)
    if description is not None:
        model.description = description
    session.flush()
    return model


def files(session: Session, model_ids: Sequence[str]) -> dict[str, list[tables.ModelFile]]:
    """Give the files of many models, by model, each in order of their names."""
    found: dict[str, list[tables.ModelFile]] = {model_id: [] for model_id in model_ids}
    query = select(tables.ModelFile).where(tables.ModelFile.model_id.in_(model_ids)).order_by(tables.ModelFile.name)
    for one in session.scalars(query):
        found[one.model_id].append(one)
    return found


def file(session: Session, model_id: str, name: str) -> tables.ModelFile:
    """Give one file of a model.

    Raises:
        NotFound: the model has no file of that name.
    """
    found = session.get(tables.ModelFile, (model_id, name))
    if found is None:
        raise NotFound("This model has no file of that name; GET …/files lists them.", code="no_such_file")
    return found


def remove(session: Session, project_id: str, model_id: str) -> None:
    """Delete a model: a tombstone stays, so that lineage stays true.

    Raises:
        Conflict: a job that has not ended needs it.
    """
    model = owned.find(session, tables.Model, model_id, project_id, lock=True)
    user = session.scalar(
        select(tables.Job.id)
        .where(
            or_(tables.Job.base_model_id == model_id, tables.Job.id == model.job_id),
            tables.Job.status.not_in(TERMINAL),
        )
        .limit(1)
    )
    if user is not None:
        raise Conflict(
            f"The job {user} needs this model; wait for it or cancel it first.", code="in_use", status=model.status,
            job=user,
        )  # fmt: skip
    session.execute(delete(tables.ModelFile).where(tables.ModelFile.model_id == model_id))
    upload_id = model.upload_id
    session.execute(
        update(tables.Model)
        .where(tables.Model.id == model_id)
        .values(deleted_at=Now(), upload_id=None, metrics={}, tags=[], description="")
    )
    if upload_id is not None:
        uploads.drop_unused(session, upload_id)
