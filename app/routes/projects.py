"""`/v1/projects`: the operator's walls between users."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import ConfigDict

from app.deps import OnceDep, OperatorDep, PageDep, SessionDep
from app.domain.errors import Conflict
from app.domain.spec import Name, Strict
from app.http.envelope import Deleted, Listing, Object, as_time, listing
from app.store import projects, tables

router = APIRouter(prefix="/v1/projects", tags=["projects"])


class NewProject(Strict):
    """A project to make."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={"examples": [{"name": "wildlife"}]})

    name: Name


class ProjectOut(Object):
    """A project."""

    object: Literal["project"] = "project"
    name: str
    created_at: datetime


def _out(project: tables.Project) -> ProjectOut:
    return ProjectOut(id=project.id, name=project.name, created_at=as_time(project.created_at))


@router.post("", status_code=201)
def create(asked: NewProject, session: SessionDep, _: OperatorDep, once: OnceDep) -> ProjectOut:
    """Make a project; its first key is made with `POST /v1/keys` and `project`."""
    once.begin(asked)
    project = projects.insert(session, asked.name)
    return once.answer(_out(project), location=f"/v1/projects/{project.id}")


@router.get("")
def read_all(session: SessionDep, _: OperatorDep, page: PageDep) -> Listing[ProjectOut]:
    """List the projects."""
    rows, has_more = projects.read(session, page)
    return listing([_out(row) for row in rows], has_more)


@router.delete("/{project_id}")
def delete(
    project_id: Annotated[str, Path(description="`prj_…`")], session: SessionDep, operator: OperatorDep
) -> Deleted:
    """Delete a project with its keys, datasets, jobs and models; 409 while a job of it is not finished."""
    if project_id == operator.project_id:
        raise Conflict("This is the project of the key that you use; delete it with another one.", code="own_project")
    projects.remove(session, project_id)
    return Deleted(id=project_id, object="project")
