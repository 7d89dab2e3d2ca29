"""What a job starts from: a dataset, a model, another job's model."""

from collections.abc import Callable

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.jobs import Status
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller, assert_error
from tests.routes.submitting import body, make_dataset, make_job

pytestmark = [pytest.mark.routes, pytest.mark.usefixtures("catalogue")]
MakeCaller = Callable[..., Caller]

UNKNOWN = "job_00000000000000000000000000"


@pytest.fixture
def dataset(engine: Engine, caller: Caller) -> str:
    return make_dataset(engine, caller)


def test_labels_are_required_where_there_are_none(client: httpx.Client, caller: Caller, engine: Engine) -> None:
    facts = {
        "task": "unlabelled_images", "classes": [], "splits": {"train": 8}, "labelled": {"train": 0}, "features": {},
        "channels": 3,
    }  # fmt: skip
    unlabelled = make_dataset(engine, caller, task="unlabelled_images", facts=facts)
    error = assert_error(client.post("/v1/jobs", json=body(unlabelled)), 422)
    assert "no training sample of this dataset has one" in error["message"]
    one_class = make_dataset(
        engine, caller, facts=facts | {"task": "image_classification", "classes": ["cat"], "labelled": {"train": 8}}
    )
    error = assert_error(client.post("/v1/jobs", json=body(one_class)), 422)
    assert "at least 2 classes; this dataset has 1: cat" in error["message"]
    assert client.post("/v1/jobs", json=body(unlabelled, recipe="autoencoder")).status_code == 201


def test_a_dataset_must_be_there_and_ready(
    client: httpx.Client, caller: Caller, make_caller: MakeCaller, engine: Engine
) -> None:
    error = assert_error(client.post("/v1/jobs", json=body("ds_" + "0" * 26)), 404)
    assert error["param"] == "dataset"
    foreign = make_dataset(engine, make_caller())
    assert_error(client.post("/v1/jobs", json=body(foreign)), 404)
    processing = make_dataset(engine, caller, ready=False)
    error = assert_error(client.post("/v1/jobs", json=body(processing)), 409, "dataset_not_ready")
    assert error["status"] == "processing"
    failed = make_dataset(engine, caller, ready=False, status="failed")
    error = assert_error(client.post("/v1/jobs", json=body(failed)), 409, "dataset_failed")
    assert error["status"] == "failed"


def test_starting_from_a_model(client: httpx.Client, caller: Caller, dataset: str, engine: Engine) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        model = factories.make_model(session, project).id
        unready = factories.make_model(session, project, status="processing", config=None).id
    job = client.post("/v1/jobs", json=body(dataset, model=model)).json()
    assert (job["status"], job["spec"]["model"]) == ("queued", model)
    with transaction(engine) as session:
        assert session.get_one(tables.Job, job["id"]).base_model_id == model
    error = assert_error(client.post("/v1/jobs", json=body(dataset, model=unready)), 409, "model_not_ready")
    assert error["status"] == "processing"
    assert_error(client.post("/v1/jobs", json=body(dataset, model="mdl_" + "0" * 26)), 404)
    error = assert_error(client.post("/v1/jobs", json=body(dataset, model=model, params={"trainable": "last:6"})), 422)
    assert "last:1 to last:5" in error["message"]


def test_a_model_as_weights_means_the_same(client: httpx.Client, caller: Caller, dataset: str, engine: Engine) -> None:
    with transaction(engine) as session:
        model = factories.make_model(session, session.get_one(tables.Project, caller.project)).id
    same = {"architecture": "resnet18", "weights": model, "image_size": 32}
    job = client.post("/v1/jobs", json=body(dataset, model=same))
    assert job.status_code == 201, job.text
    assert job.json()["spec"]["model"] == model
    other = body(dataset, model={"architecture": "small_cnn", "weights": model})
    error = assert_error(client.post("/v1/jobs", json=other), 422)
    assert error["param"] == "model.architecture"


def test_a_public_model_may_be_started_from(
    client: httpx.Client, make_caller: MakeCaller, dataset: str, engine: Engine
) -> None:
    other = make_caller()
    with transaction(engine) as session:
        project = session.get_one(tables.Project, other.project)
        public = factories.make_model(session, project, visibility="public").id
        private = factories.make_model(session, project).id
    assert client.post("/v1/jobs", json=body(dataset, model=public)).status_code == 201
    assert_error(client.post("/v1/jobs", json=body(dataset, model=private)), 404)


@pytest.mark.parametrize("status", [Status.QUEUED, Status.RUNNING, Status.PAUSED])
def test_a_job_waits_for_the_model_of_another(
    client: httpx.Client, caller: Caller, dataset: str, engine: Engine, status: Status
) -> None:
    parent = make_job(engine, caller, status, spec={"model": {"architecture": "resnet18"}})
    child = client.post("/v1/jobs", json=body(dataset, model=parent)).json()
    assert child["status"] == "waiting"
    assert child["queue"] == {"position": None}
    refused = client.post("/v1/jobs", json=body(dataset, model=child["id"], params={"trainable": "last:7"}))
    assert "resnet18 has 5 stages" in assert_error(refused, 422)["message"]  # known through the whole chain
    grandchild = client.post("/v1/jobs", json=body(dataset, model=child["id"])).json()
    assert grandchild["status"] == "waiting"


def test_a_parent_that_has_ended_is_used_at_once_or_refused(
    client: httpx.Client, caller: Caller, dataset: str, engine: Engine
) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        parent = factories.make_job(session, project)
        model = factories.make_model(session, project, job_id=parent.id)
        parent.model_id = model.id
        factories.bring(session, parent, Status.SUCCEEDED)
    child = client.post("/v1/jobs", json=body(dataset, model=parent.id)).json()
    assert child["status"] == "queued"
    with transaction(engine) as session:
        assert session.get_one(tables.Job, child["id"]).base_model_id == model.id

    failed = make_job(engine, caller, Status.FAILED)
    error = assert_error(client.post("/v1/jobs", json=body(dataset, model=failed)), 409, "parent_failed")
    assert error["status"] == "failed"
    makes_none = make_job(engine, caller, kind="apply")
    assert_error(client.post("/v1/jobs", json=body(dataset, model=makes_none)), 422)
    assert_error(client.post("/v1/jobs", json=body(dataset, model=UNKNOWN)), 404)
