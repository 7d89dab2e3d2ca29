"""What a job leaves: numbers, checkpoints, files."""

import base64
import hashlib
from collections.abc import Callable

import httpx
import pytest
from sqlalchemy import Engine

from app.domain.jobs import Status
from app.store import checkpoints, metrics
from app.store.blobs import Blobs
from app.store.session import transaction
from tests import factories
from tests.factories import tables
from tests.routes.conftest import Caller, assert_error

pytestmark = pytest.mark.routes
MakeCaller = Callable[..., Caller]
DATA = bytes(range(256)) * 10


@pytest.fixture
def job(engine: Engine, caller: Caller) -> str:
    with transaction(engine) as session:
        made = factories.make_job(session, session.get_one(tables.Project, caller.project))
        return factories.bring(session, made, Status.RUNNING).id


def write(engine: Engine, job_id: str, rows: list[metrics.Row]) -> None:
    with transaction(engine) as session:
        metrics.write(session, session.get_one(tables.Job, job_id), rows, 1)


def add_file(engine: Engine, blobs: Blobs, job_id: str, name: str = "table.csv", data: bytes = DATA) -> str:
    stored = factories.make_blob(engine, blobs, data)
    with transaction(engine) as session:
        session.add(
            tables.JobFile(job_id=job_id, name=name, media_type="text/csv", bytes=stored.bytes, sha256=stored.sha256)
        )
    return f"/v1/jobs/{job_id}/files/{name}"


def test_numbers_by_name_and_step(client: httpx.Client, engine: Engine, job: str) -> None:
    rows: list[metrics.Row] = [("train/loss", step, 1.0 / (step + 1)) for step in range(10)]
    write(engine, job, [*rows, ("validation/accuracy", 9, 0.5), ("train/odd", 0, float("nan"))])
    found = client.get(f"/v1/jobs/{job}/metrics").json()
    assert set(found) == {"train/loss", "train/odd", "validation/accuracy"}
    assert found["train/loss"] == [[step, value] for _, step, value in rows]
    assert found["train/odd"] == [[0, None]]
    one = client.get(f"/v1/jobs/{job}/metrics", params={"name": "validation/accuracy"}).json()
    assert one == {"validation/accuracy": [[9, 0.5]]}
    two = client.get(f"/v1/jobs/{job}/metrics", params={"name": ["validation/accuracy", "train/odd"]}).json()
    assert set(two) == {"validation/accuracy", "train/odd"}
    assert [
        step for step, _ in client.get(f"/v1/jobs/{job}/metrics", params={"after_step": 7}).json()["train/loss"]
    ] == [8, 9]
    assert client.get(f"/v1/jobs/{job}/metrics", params={"name": "nothing"}).json() == {}


def test_thinning_keeps_ends_and_extremes(client: httpx.Client, engine: Engine, job: str) -> None:
    values = [float(step % 7) for step in range(3000)]
    values[1234], values[2345] = 99.0, -99.0
    write(engine, job, [("train/loss", step, value) for step, value in enumerate(values)])
    found = client.get(f"/v1/jobs/{job}/metrics").json()["train/loss"]
    assert len(found) <= 500
    assert found[0] == [0, values[0]]
    assert found[-1] == [2999, values[2999]]
    assert [1234, 99.0] in found
    assert [2345, -99.0] in found
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    assert all(values[step] == value for step, value in found)
    few = client.get(f"/v1/jobs/{job}/metrics", params={"max_points": 20}).json()["train/loss"]
    assert len(few) <= 20
    assert [1234, 99.0] in few
    assert_error(client.get(f"/v1/jobs/{job}/metrics", params={"max_points": 0}), 422)


def test_checkpoints_are_listed_and_downloaded(client: httpx.Client, engine: Engine, blobs: Blobs, job: str) -> None:
    stored = factories.make_blob(engine, blobs, DATA)
    with transaction(engine) as session:
        row = session.get_one(tables.Job, job)
        kept = [
            checkpoints.insert(
                session, row, step=step, epoch=step // 10, metrics={"train/loss": 0.5}, best_step=10,
                bytes=stored.bytes, sha256=stored.sha256,
            ).id
            for step in (10, 20)
        ]  # fmt: skip
    page = client.get(f"/v1/jobs/{job}/checkpoints").json()
    assert [one["id"] for one in page["data"]] == kept[::-1]
    assert set(page["data"][0]) == {
        "id", "object", "step", "epoch", "metrics", "bytes", "sha256", "best", "attempt", "created_at",
    }  # fmt: skip
    assert [(one["step"], one["best"]) for one in page["data"]] == [(20, False), (10, True)]
    answer = client.get(f"/v1/jobs/{job}/checkpoints/{kept[0]}/file")
    assert answer.content == DATA
    assert f"{job}-step-10.safetensors" in answer.headers["content-disposition"]
    assert_error(client.get(f"/v1/jobs/{job}/checkpoints/ckpt_{'0' * 26}/file"), 404)
    with transaction(engine) as session:
        other = factories.make_job(session, session.get_one(tables.Project, row.project_id)).id
    assert_error(client.get(f"/v1/jobs/{other}/checkpoints/{kept[0]}/file"), 404)


def test_files_are_listed_with_the_job_and_downloaded(
    client: httpx.Client, engine: Engine, blobs: Blobs, job: str
) -> None:
    path = add_file(engine, blobs, job)
    digest = hashlib.sha256(DATA).hexdigest()
    described = {"name": "table.csv", "media_type": "text/csv", "bytes": len(DATA), "sha256": digest}
    assert client.get(f"/v1/jobs/{job}/files").json()["data"] == [described]
    assert client.get(f"/v1/jobs/{job}").json()["files"] == [described]
    answer = client.get(path)
    assert answer.content == DATA
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["x-content-type-options"] == "nosniff"
    sent = answer.headers["repr-digest"]
    assert base64.b64decode(sent.removeprefix("sha-256=:").removesuffix(":")) == bytes.fromhex(digest)
    assert_error(client.get(f"/v1/jobs/{job}/files/nothing"), 404, "no_such_file")


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=2550-", 2550, 2560),
        ("bytes=-5", 2555, 2560),
        ("bytes=0-999999", 0, 2560),
        ("bytes=-999999", 0, 2560),
    ],
)
def test_a_range_gives_that_part(
    client: httpx.Client, engine: Engine, blobs: Blobs, job: str, asked: str, start: int, end: int
) -> None:
    answer = client.get(add_file(engine, blobs, job), headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == DATA[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/2560"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("asked", ["bytes=2560-", "bytes=9999-10000", "bytes=-0"])
def test_a_range_outside(client: httpx.Client, engine: Engine, blobs: Blobs, job: str, asked: str) -> None:
    answer = client.get(add_file(engine, blobs, job), headers={"Range": asked})
    assert_error(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */2560"


@pytest.mark.parametrize("asked", ["bytes=5-1", "bytes=0-1,3-4", "lines=0-1", "bytes=-", "bytes=a-b", "nonsense"])
def test_what_is_no_single_range_gives_the_whole(
    client: httpx.Client, engine: Engine, blobs: Blobs, job: str, asked: str
) -> None:
    answer = client.get(add_file(engine, blobs, job), headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_conditions(client: httpx.Client, engine: Engine, blobs: Blobs, job: str) -> None:
    path = add_file(engine, blobs, job)
    tag = client.get(path).headers["etag"]
    for condition in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = client.get(path, headers={"If-None-Match": condition})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get(path, headers={"Range": "bytes=0-1", "If-Range": tag}).status_code == 206
    assert client.get(path, headers={"Range": "bytes=0-1", "If-Range": '"other"'}).status_code == 200


def test_an_empty_file(client: httpx.Client, engine: Engine, blobs: Blobs, job: str) -> None:
    path = add_file(engine, blobs, job, data=b"")
    assert client.get(path).content == b""
    assert_error(client.get(path, headers={"Range": "bytes=0-"}), 416)


def test_lost_bytes_are_said_to_be_lost(client: httpx.Client, engine: Engine, blobs: Blobs, job: str) -> None:
    path = add_file(engine, blobs, job, data=b"will be lost " + job.encode())
    blobs.delete(client.get(f"/v1/jobs/{job}/files").json()["data"][0]["sha256"])
    assert_error(client.get(path), 503, "storage_missing")


def test_another_projects_artefacts_are_not_there(
    client: httpx.Client, make_caller: MakeCaller, engine: Engine, blobs: Blobs
) -> None:
    other = make_caller()
    with transaction(engine) as session:
        job = factories.make_job(session, session.get_one(tables.Project, other.project)).id
    path = add_file(engine, blobs, job)
    assert other.http.get(path).status_code == 200
    for hidden in (path, f"/v1/jobs/{job}/files", f"/v1/jobs/{job}/metrics", f"/v1/jobs/{job}/checkpoints"):
        assert_error(client.get(hidden), 404)
