"""Jobs of a caller, in the body of a request and in the database."""

from typing import Any

from sqlalchemy import Engine

from app.domain.jobs import Status
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller


def make_dataset(engine: Engine, caller: Caller, **columns: Any) -> str:
    """Make a dataset of the caller."""
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        return factories.make_dataset(session, project, **columns).id


def make_job(engine: Engine, caller: Caller, status: Status = Status.QUEUED, **columns: Any) -> str:
    """Make a job of the caller, in any status."""
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        job = factories.make_job(session, project, **columns)
        return factories.bring(session, job, status).id


def body(dataset: str, **changes: Any) -> dict[str, Any]:
    """Give a body to submit."""
    return {"recipe": "image_classification", "dataset": dataset, "model": {"architecture": "small_cnn"}} | changes
