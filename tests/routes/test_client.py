"""The client against the real application, also over a wire that loses answers."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.client import Client, Refused
from app.domain.jobs import Actor, Status
from app.store import events, life, tables
from app.store.blobs import Blobs
from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, Service

pytestmark = pytest.mark.routes


class Lossy(httpx.BaseTransport):
    """A real wire that loses answers: the server did the work, the client never hears of it."""

    def __init__(self, losses: int) -> None:
        self.losses, self.sent = losses, 0
        self._wire = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it, and lose the answer while there are losses left."""
        response = self._wire.handle_request(request)
        self.sent += 1
        if self.losses > 0:
            self.losses -= 1
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost")
        return response

    def close(self) -> None:
        """Give the sockets back."""
        self._wire.close()


@pytest.fixture
def connect(service: Service, caller: Caller) -> Iterator[Callable[..., Client]]:
    """Give a function that makes a client of the test's project."""
    with ExitStack() as stack:

        def connect(key: str = caller.key, transport: httpx.BaseTransport | None = None) -> Client:
            return stack.enter_context(Client(service.url, key, patience=10, transport=transport))

        yield connect


@pytest.fixture
def tuneyard(connect: Callable[..., Client]) -> Client:
    """Give a client."""
    return connect()


@pytest.fixture
def spec(engine: Engine, caller: Caller) -> dict[str, Any]:
    """Give a job that could be queued."""
    factories.publish_catalogue(engine)
    with transaction(engine) as session:
        project = session.get_one(tables.Project, caller.project)
        dataset = factories.make_dataset(session, project)
    return {"recipe": "image_classification", "dataset": dataset.id, "model": {"architecture": "resnet18"}}


def test_a_job_whose_answers_were_lost_is_one_job(connect: Callable[..., Client], spec: dict[str, Any]) -> None:
    wire = Lossy(losses=3)
    one = connect(transport=wire)
    one.me()
    wire.losses = 2
    made = one.jobs.submit(spec)
    assert wire.sent > 4
    assert [job["id"] for job in one.jobs.each()] == [made["id"]]


def test_a_key_whose_answer_was_lost_is_one_key_and_works(
    connect: Callable[..., Client], make_caller: Callable[..., Caller]
) -> None:
    wire = Lossy(losses=0)
    one = connect(transport=wire)
    before = len(one.keys.list()["data"])
    wire.losses = 1
    made = one.keys.create("ci", scopes=["read"])
    assert len(one.keys.list()["data"]) == before + 1
    assert connect(key=made["key"]).me()["name"] == "ci"
    one.keys.revoke(made["id"])
    with pytest.raises(Refused) as caught:
        connect(key=made["key"]).me()
    assert (caught.value.status, caught.value.code) == (401, "unauthenticated")


def test_a_refusal_names_the_field(tuneyard: Client, spec: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        tuneyard.jobs.submit(spec | {"recipe": "image_clasification"})
    assert caught.value.status == 422
    assert "image_classification" in caught.value.message
    assert caught.value.request_id
    with pytest.raises(Refused, match="epochs") as caught:
        tuneyard.jobs.submit(spec | {"training": {"epochs": 0}})
    assert caught.value.details[0]["pointer"] == "/training/epochs"


def test_pages_and_filters(tuneyard: Client, spec: dict[str, Any]) -> None:
    made = [tuneyard.jobs.submit(spec | {"name": f"n{i}", "metadata": {"n": str(i % 2)}})["id"] for i in range(5)]
    page = tuneyard.jobs.list(limit=2)
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (made[:2:-1], True)
    after = tuneyard.jobs.list(limit=5, after=page["last_id"])
    assert [job["id"] for job in after["data"]] == made[2::-1]
    assert [job["id"] for job in tuneyard.jobs.each(metadata={"n": "1"}, order="asc")] == made[1::2]
    assert list(tuneyard.jobs.each(status="failed")) == []


def test_verbs_answer_with_the_job_and_refuse_with_its_status(tuneyard: Client, spec: dict[str, Any]) -> None:
    job = tuneyard.jobs.submit(spec)["id"]
    assert tuneyard.jobs.pause(job)["status"] == "paused"
    assert tuneyard.jobs.resume(job)["status"] == "queued"
    assert tuneyard.jobs.cancel(job)["status"] == "cancelled"
    with pytest.raises(Refused) as caught:
        tuneyard.jobs.resume(job)
    assert (caught.value.status, caught.value.body["status"]) == (409, "cancelled")
    again = tuneyard.jobs.retry(job)
    assert (again["retry_of"], again["status"]) == (job, "queued")
    assert tuneyard.jobs.delete(job)["deleted"] is True


def test_a_dry_run_keeps_nothing(tuneyard: Client, spec: dict[str, Any]) -> None:
    assert tuneyard.jobs.dry_run(spec)["spec"]["training"]["epochs"] > 0
    assert list(tuneyard.jobs.each()) == []


def test_waiting_hears_of_the_end_at_once(tuneyard: Client, spec: dict[str, Any]) -> None:
    job = tuneyard.jobs.submit(spec)["id"]
    ended: list[float] = []

    def end() -> None:
        time.sleep(1)
        tuneyard.jobs.cancel(job)
        ended.append(time.monotonic())

    thread = threading.Thread(target=end)
    thread.start()
    assert tuneyard.jobs.wait(job)["status"] == "cancelled"
    heard = time.monotonic()
    thread.join()
    assert heard - ended[0] < 15, "a long poll of 25 s was held to its end"
    assert tuneyard.jobs.wait(tuneyard.jobs.retry(job)["id"], timeout=0.3)["status"] == "queued"


def test_events_stream_to_the_last_and_go_on_after_a_cut(
    tuneyard: Client, spec: dict[str, Any], engine: Engine
) -> None:
    job = tuneyard.jobs.submit(spec)["id"]

    def write() -> None:
        for number in range(3):
            time.sleep(0.2)
            with transaction(engine) as session:
                row = session.get_one(tables.Job, job)
                events.append(session, row, type="log", code="said", message=f"line {number}")
        with transaction(engine) as session:
            life.move(session, session.get_one(tables.Job, job), Status.CANCELLED, actor=Actor.API)

    thread = threading.Thread(target=write)
    thread.start()
    heard = list(tuneyard.jobs.events(job))
    thread.join()
    assert [event["number"] for event in heard] == list(range(1, len(heard) + 1))
    assert [event["message"] for event in heard if event["code"] == "said"] == ["line 0", "line 1", "line 2"]
    assert heard[-1]["type"] == "done"
    assert list(tuneyard.jobs.events(job, after=heard[2]["number"])) == heard[3:]
    assert list(tuneyard.jobs.events(job, after=heard[-1]["number"])) == []
    assert tuneyard.jobs.logged(job, after=1, limit=2) == heard[1:3]


def test_a_model_is_downloaded_over_a_cut_and_verified(
    tuneyard: Client, engine: Engine, blobs: Blobs, caller: Caller, tmp_path: Path
) -> None:
    data = hashlib.sha256(b"seed").digest() * 20_000
    stored = factories.make_blob(engine, blobs, data)
    with transaction(engine) as session:
        model = factories.make_model(session, session.get_one(tables.Project, caller.project), name="cats")
        session.add(
            tables.ModelFile(model_id=model.id, name="model.safetensors", bytes=stored.bytes, sha256=stored.sha256)
        )
    (tmp_path / "model.safetensors.part").write_bytes(data[:100_000])
    told: list[int] = []
    [file] = tuneyard.models.files(model.id)
    path = tuneyard.models.fetch(model.id, file, tmp_path, advance=lambda have, _total: told.append(have))
    assert path.read_bytes() == data
    assert told[0] > 100_000, "what was there already came again"
    assert tuneyard.models.list(name="cats")["data"][0]["id"] == model.id
    assert tuneyard.models.download(model.id, tmp_path) == [path]


def test_a_dataset_is_uploaded_once_though_the_answer_was_lost(connect: Callable[..., Client], tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "a.png").write_bytes(b"not read here" * 100_000)
    wire = Lossy(losses=0)
    one = connect(transport=wire)
    one.me()
    wire.losses = 1
    told: list[tuple[int, int]] = []
    made = one.datasets.upload(folder, "pets", metadata={"from": "me"}, advance=lambda *place: told.append(place))
    assert (made["name"], made["status"], made["metadata"]) == ("pets", "processing", {"from": "me"})
    assert [dataset["id"] for dataset in one.datasets.each()] == [made["id"]]
    assert told[-1][0] == told[-1][1] > 1_300_000


def test_a_standard_set_is_made_by_name_and_deleted(tuneyard: Client) -> None:
    made = tuneyard.datasets.create("digits", builtin="digits")
    assert tuneyard.datasets.get(made["id"])["name"] == "digits"
    assert tuneyard.datasets.wait(made["id"], timeout=0.2)["status"] == "processing"
    assert tuneyard.jobs.list(kind="internal")["data"][0]["status"] == "queued"


def test_projects_are_for_operators(connect: Callable[..., Client], make_caller: Callable[..., Caller]) -> None:
    operator = connect(key=make_caller("read", "write", "admin", "operator").key)
    made = operator.projects.create(f"wild {time.time_ns()}")
    key = operator.keys.create("first", scopes=["read"], project=made["id"])
    assert connect(key=key["key"]).me()["project"]["id"] == made["id"]
    assert operator.projects.delete(made["id"])["deleted"] is True
    with pytest.raises(Refused, match="operator"):
        connect().projects.create("mine")


def test_recipes_workers_and_health(tuneyard: Client, spec: dict[str, Any]) -> None:
    assert spec["recipe"] in {recipe["name"] for recipe in tuneyard.recipes.list()["data"]}
    assert tuneyard.recipes.get(spec["recipe"])["schema"]["type"] == "object"
    assert "resnet18" in {network["name"] for network in tuneyard.recipes.architectures()["data"]}
    assert isinstance(tuneyard.workers()["data"], list)
    assert tuneyard.ready()["status"] in {"ok", "degraded"}
