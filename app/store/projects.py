"""Projects: the walls between everything else."""

from contextlib import suppress

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.domain.errors import Conflict, NotFound
from app.domain.jobs import TERMINAL
from app.store import page, tables
from app.store.clock import Now
from app.store.ids import new_id


def insert(session: Session, name: str) -> tables.Project:
    """Insert a project.

    Raises:
        Conflict: the name is taken. Names are never used again, so that a line of an old log keeps its meaning.
    """
    project = tables.Project(id=new_id("prj"), name=name)
    try:
        with session.begin_nested():
            session.add(project)
            session.flush()
    except IntegrityError:
        raise Conflict(
            f"A project named {name!r} exists or existed; choose another name.", code="name_taken", param="name"
        ) from None
    session.refresh(project)
    return project


def find(session: Session, project_id: str, *, lock: bool = False) -> tables.Project:
    """Find a living project; with `lock`, whoever else locks it waits until the commit."""
    query = select(tables.Project).where(tables.Project.id == project_id, tables.Project.deleted_at.is_(None))
    project = session.scalar(query.with_for_update() if lock else query)
    if project is None:
        raise NotFound("There is no such project.")
    return project


def first(session: Session, name: str) -> tables.Project:
    """Find or make the project of the first key, and lock it, so that two processes never make two first keys."""
    with suppress(Conflict):
        insert(session, name)
    return session.scalars(select(tables.Project).where(tables.Project.name == name).with_for_update()).one()


def read(session: Session, wanted: page.Page) -> tuple[list[tables.Project], bool]:
    """List the projects."""
    return page.read(
        session, select(tables.Project).where(tables.Project.deleted_at.is_(None)), tables.Project.id, wanted
    )


def remove(session: Session, project_id: str) -> tables.Project:
    """Delete a project and all it holds; tombstones stay, its bytes are swept later.

    Raises:
        NotFound: there is no such project.
        Conflict: some of its jobs are not finished.
    """
    project = find(session, project_id, lock=True)
    unfinished = session.scalar(
        select(func.count()).where(tables.Job.project_id == project_id, tables.Job.status.not_in(TERMINAL))
    )
    if unfinished:
        raise Conflict(f"{unfinished} jobs of this project are not finished; cancel them first.", code="in_use")
    datasets = select(tables.Dataset.id).where(tables.Dataset.project_id == project_id)
    models = select(tables.Model.id).where(tables.Model.project_id == project_id)
    jobs = select(tables.Job.id).where(tables.Job.project_id == project_id)
    keys = select(tables.Key.id).where(tables.Key.project_id == project_id)
    for statement in (
        delete(tables.Shard).where(tables.Shard.dataset_id.in_(datasets)),
        delete(tables.ModelFile).where(tables.ModelFile.model_id.in_(models)),
        delete(tables.JobFile).where(tables.JobFile.job_id.in_(jobs)),
        delete(tables.Checkpoint).where(tables.Checkpoint.job_id.in_(jobs)),
        delete(tables.Metric).where(tables.Metric.job_id.in_(jobs)),
        delete(tables.Event).where(tables.Event.job_id.in_(jobs)),
        delete(tables.Session).where(tables.Session.key_id.in_(keys)),
        delete(tables.Idempotency).where(tables.Idempotency.project_id == project_id),
        update(tables.Dataset).where(tables.Dataset.project_id == project_id).values(upload_id=None),
        update(tables.Model).where(tables.Model.project_id == project_id).values(upload_id=None),
        delete(tables.Upload).where(tables.Upload.project_id == project_id),
        update(tables.Key).where(tables.Key.project_id == project_id).values(revoked_at=Now()),
        *(
            update(table).where(table.project_id == project_id, table.deleted_at.is_(None)).values(deleted_at=Now())
            for table in (tables.Dataset, tables.Model, tables.Job)
        ),
        update(tables.Project).where(tables.Project.id == project_id).values(deleted_at=Now()),
    ):
        session.execute(statement.execution_options(synchronize_session=False))
    return project
