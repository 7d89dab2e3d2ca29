"""Projects: the operator makes, lists and deletes them."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, assert_error

pytestmark = pytest.mark.routes
MakeCaller = Callable[..., Caller]


@pytest.fixture
def operator(make_caller: MakeCaller) -> Caller:
    return make_caller("operator", "admin", "read")


def test_make_list_delete(operator: Caller, make_caller: MakeCaller) -> None:
    made = operator.http.post("/v1/projects", json={"name": "wildlife " + operator.project})
    assert made.status_code == 201
    project = made.json()
    assert set(project) == {"id", "object", "name", "created_at"}
    assert project["object"] == "project"
    assert project["created_at"].endswith("Z")
    assert made.headers["location"] == f"/v1/projects/{project['id']}"
    listed = operator.http.get("/v1/projects", params={"limit": 1000}).json()
    assert project in listed["data"]
    inside = make_caller("read", project=project["id"])
    assert inside.http.get("/v1/me").json()["project"] == {"id": project["id"], "name": project["name"]}

    deleted = operator.http.delete(f"/v1/projects/{project['id']}")
    assert deleted.json() == {"id": project["id"], "object": "project", "deleted": True}
    assert_error(inside.http.get("/v1/me"), 401)
    assert_error(operator.http.delete(f"/v1/projects/{project['id']}"), 404)


def test_a_name_is_never_used_twice(operator: Caller) -> None:
    name = {"name": "once " + operator.project}
    first = operator.http.post("/v1/projects", json=name).json()
    assert assert_error(operator.http.post("/v1/projects", json=name), 409, "name_taken")["param"] == "name"
    operator.http.delete(f"/v1/projects/{first['id']}")
    assert_error(operator.http.post("/v1/projects", json=name), 409, "name_taken")


def test_a_project_in_use_stays(operator: Caller, make_caller: MakeCaller, engine: Engine) -> None:
    other = make_caller()
    with transaction(engine) as session:
        project = session.get_one(factories.tables.Project, other.project)
        dataset = factories.make_dataset(session, project)
        job = factories.make_job(session, project, dataset_id=dataset.id)
    assert_error(operator.http.delete(f"/v1/projects/{other.project}"), 409, "in_use")
    with transaction(engine) as session:
        session.get_one(factories.tables.Job, job.id).status = "cancelled"
    assert operator.http.delete(f"/v1/projects/{other.project}").status_code == 200


def test_nobody_deletes_the_ground_they_stand_on(operator: Caller) -> None:
    assert_error(operator.http.delete(f"/v1/projects/{operator.project}"), 409, "own_project")


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": 3}, {"name": "a/b"}, {"name": "x" * 201}, {"nam": "x"}])
def test_bad_names_are_named(operator: Caller, body: dict[str, object]) -> None:
    error = assert_error(operator.http.post("/v1/projects", json=body), 422, "invalid")
    assert error["details"][0]["pointer"] in ("/name", "/nam")
