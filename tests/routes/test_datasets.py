"""Datasets: made of a form, an upload or a standard set; listed, waited for, deleted."""

import errno
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, select

from app.domain.errors import Failure
from app.settings import Settings
from app.store import datasets, tables
from app.store.blobs import Blobs, Sink
from app.store.clock import Now
from app.store.ids import new_id
from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, Service, assert_error

pytestmark = pytest.mark.routes

FIELDS = {
    "id", "object", "name", "version", "status", "task", "format", "bytes", "sha256", "samples", "splits", "features",
    "classes", "report", "progress", "job", "error", "created_at", "metadata",
}  # fmt: skip


def test_one_shot_upload(client: httpx.Client, engine: Engine, blobs: Blobs) -> None:
    data = b"PK not really a zip " * 100_000
    answer = client.post(
        "/v1/datasets",
        files={"file": ("cats.zip", data)},
        data={"name": "cats", "task": "image_classification", "on_error": "fail", "metadata": '{"by": "me"}'},
    )
    assert answer.status_code == 202, answer.text
    made = answer.json()
    assert set(made) == FIELDS
    assert answer.headers["location"] == f"/v1/datasets/{made['id']}"
    assert (made["status"], made["name"], made["version"], made["bytes"]) == ("processing", "cats", 1, len(data))
    assert (made["metadata"], made["classes"], made["splits"], made["error"]) == ({"by": "me"}, [], {}, None)
    with transaction(engine, read_only=True) as session:
        row = session.get_one(tables.Dataset, made["id"])
        upload = session.get_one(tables.Upload, row.upload_id)
        job = session.get_one(tables.Job, made["job"])
        assert upload.filename == "cats.zip"
        assert (job.kind, job.internal, job.status, job.dataset_id) == ("internal", True, "queued", row.id)
        assert job.spec == {
            "upload": upload.id, "builtin": None, "on_error": "fail", "task": "image_classification",
        }  # fmt: skip
    assert upload.sha256 == hashlib.sha256(data).hexdigest()
    assert b"".join(blobs.open(upload.sha256)) == data
    assert client.get(f"/v1/datasets/{made['id']}").json() == made


def test_fields_may_follow_the_file(client: httpx.Client) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n\r\n--xy\r\n\r\n--x\r\n'
        b'Content-Disposition: form-data; name="name"\r\n\r\nlate\r\n--x--\r\n'
    )
    made = client.post("/v1/datasets", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert made.status_code == 202, made.text
    assert made.json()["name"] == "late"
    assert made.json()["bytes"] == len(b"\r\n--xy\r\n")


def test_builtin_and_versions(client: httpx.Client) -> None:
    first = client.post("/v1/datasets", json={"name": "digits", "builtin": "digits"})
    second = client.post("/v1/datasets", json={"name": "digits", "builtin": "digits"})
    assert [first.status_code, second.status_code] == [202, 202]
    assert [first.json()["version"], second.json()["version"]] == [1, 2]
    assert client.delete(f"/v1/datasets/{second.json()['id']}").status_code == 409


def test_from_an_upload(caller: Caller, make_caller: Callable[..., Caller], engine: Engine, blobs: Blobs) -> None:
    stored = factories.make_blob(engine, blobs)
    with transaction(engine) as session:
        ids = [new_id("upl"), new_id("upl")]
        for upload_id, lives in zip(ids, (60, -60), strict=True):
            session.add(
                tables.Upload(
                    id=upload_id, project_id=caller.project, bytes=stored.bytes, sha256=stored.sha256,
                    expires_at=Now() + lives,
                )
            )  # fmt: skip
    made = caller.http.post("/v1/datasets", json={"name": "a", "upload": ids[0]})
    assert made.status_code == 202
    assert made.json()["bytes"] == stored.bytes
    with transaction(engine, read_only=True) as session:
        assert session.get_one(tables.Upload, ids[0]).expires_at is None
    assert_error(caller.http.post("/v1/datasets", json={"name": "a", "upload": ids[1]}), 410)
    assert_error(caller.http.post("/v1/datasets", json={"name": "a", "upload": new_id("upl")}), 404)
    assert_error(make_caller().http.post("/v1/datasets", json={"name": "a", "upload": ids[0]}), 404)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": "a"}, ""),
        ({"name": "a", "builtin": "digits", "upload": "upl_x"}, ""),
        ({"builtin": "digits"}, "/name"),
        ({"name": "a", "builtin": "digts"}, "/builtin"),
        ({"name": "a", "builtin": "digits", "task": "x"}, "/task"),
        ({"name": "a", "builtin": "digits", "on_error": "x"}, "/on_error"),
        ({"name": "a", "builtin": "digits", "metadata": {"k": 1}}, "/metadata/k"),
        ({"name": "a", "builtin": "digits", "metadata": {str(i): "" for i in range(17)}}, "/metadata"),
        ({"name": "a", "builtin": "digits", "colour": 1}, "/colour"),
        ([], ""),
    ],
)
def test_bad_json_names_the_field(client: httpx.Client, body: Any, pointer: str) -> None:
    error = assert_error(client.post("/v1/datasets", json=body), 422, "invalid")
    assert pointer in [detail["pointer"] for detail in error["details"]]


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({}, {"name": "a", "task": "image_classification"}, "file"),
        ({"file": b"x"}, {}, "name"),
        ({"file": b"x"}, {"name": "a", "task": "dance"}, "task"),
        ({"file": b"x"}, {"name": "a", "metadata": "{"}, "metadata"),
        ({"file": b"x"}, {"name": "a", "metadata": "[]"}, "metadata"),
        ({"file": b"x"}, {"name": "a", "colour": "red"}, "colour"),
        ({"file": b"x"}, {"name": ["a", "b"]}, "name"),
        ({"file": b"x"}, {"name": "a\x00b"}, "name"),
        ({"file": b"x"}, {"name": "a" * 70_000}, "name"),
    ],
)
def test_bad_forms_name_the_part_and_leave_nothing(
    client: httpx.Client, settings: Settings, files: dict[str, bytes], data: dict[str, str], param: str
) -> None:
    answer = client.post("/v1/datasets", files=files or {"name": (None, "a")}, data=data if files else {})
    assert assert_error(answer, 422)["param"] == param
    assert client.get("/v1/datasets").json()["data"] == []
    assert list((settings.home_path / "blobs" / "incoming").iterdir()) == []


def test_a_disk_that_fills_up_is_said_plainly_and_leaves_nothing(
    client: httpx.Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(sink: Sink, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sink, "write", full)
    answer = client.post("/v1/datasets", files={"file": b"x" * 3_000_000}, data={"name": "d"})
    assert_error(answer, 503, "insufficient_storage")
    assert "retry-after" in answer.headers
    assert client.get("/v1/datasets").json()["data"] == []
    assert list((settings.home_path / "blobs" / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=" + "x" * 300, b"", 400),
        ("multipart/form-data; boundary=x", b"rubbish", 400),
        ("multipart/form-data; boundary=x", b"", 400),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc', 400),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n", 400),
        ("application/json", b"{", 400),
        ("application/json", b'{"name": NaN}', 400),
        ("application/json", b'{"name": "\\u0000"}', 400),
        ("application/json", b'{"name": "\\ud800"}', 400),
        ("application/json", b"[" * 5000, 400),
        ("application/json", b'{"name": "\xff"}', 400),
        ("application/json", b"", 422),
        ("text/plain", b"hello", 415),
        ("", b"hello", 415),
    ],
)
def test_unreadable_bodies(client: httpx.Client, content_type: str, body: bytes, status: int) -> None:
    assert_error(client.post("/v1/datasets", content=body, headers={"Content-Type": content_type}), status)


def test_list_filters_and_cursors(client: httpx.Client) -> None:
    ids = []
    for number in range(5):
        body = {"name": f"set {number % 2}", "builtin": "digits", "metadata": {"k": str(number), "a b": "c"}}
        ids.append(client.post("/v1/datasets", json=body).json()["id"])

    def pages(**query: Any) -> list[str]:
        seen: list[str] = []
        while True:
            page = client.get("/v1/datasets", params=query).json()
            assert page["object"] == "list"
            got = [item["id"] for item in page["data"]]
            assert (page["first_id"], page["last_id"]) == ((got[0], got[-1]) if got else (None, None))
            seen += got
            if not page["has_more"]:
                return seen
            query["after"] = page["last_id"]

    assert pages() == ids[::-1]
    assert pages(limit=2) == ids[::-1]
    assert pages(limit=2, order="asc") == ids
    assert pages(name="set 1") == [ids[3], ids[1]]
    assert pages(**{"metadata[k]": "2"}) == [ids[2]]
    assert pages(**{"metadata[k]": "2", "metadata[a b]": "c"}) == [ids[2]]
    assert pages(**{"metadata[k]": "2", "metadata[a b]": "x"}) == []
    for query in ({"limit": 0}, {"limit": 1001}, {"after": "x"}, {"order": "up"}, {'metadata["]': "1"}):
        assert_error(client.get("/v1/datasets", params=query), 422)


def test_wait_ends_when_the_dataset_is_ready_or_the_time_is_up(caller: Caller, engine: Engine) -> None:
    made = caller.http.post("/v1/datasets", json={"name": "d", "builtin": "digits"}).json()
    begin = time.monotonic()
    answer = caller.http.get(f"/v1/datasets/{made['id']}", params={"wait": 0.5})
    assert answer.json()["status"] == "processing"
    assert 0.4 < time.monotonic() - begin < 20

    def end() -> None:
        time.sleep(0.5)
        with transaction(engine) as session:
            failure = Failure(fault="data", code="no_images", message="There is no image.", hint="Send some.")
            datasets.fail(session, made["id"], failure)

    thread = threading.Thread(target=end)
    thread.start()
    begin = time.monotonic()
    answer = caller.http.get(f"/v1/datasets/{made['id']}", params={"wait": 60})
    thread.join()
    assert time.monotonic() - begin < 30
    assert answer.json()["status"] == "failed"
    assert answer.json()["error"] == {
        "class": "data", "code": "no_images", "message": "There is no image.", "hint": "Send some.", "phase": None,
        "retryable": False,
    }  # fmt: skip
    for wait in ("-1", "x", "nan", "1e9"):
        assert_error(caller.http.get(f"/v1/datasets/{made['id']}", params={"wait": wait}), 422)


def test_delete_leaves_a_tombstone(caller: Caller, engine: Engine, blobs: Blobs) -> None:
    made = caller.http.post("/v1/datasets", files={"file": b"some bytes"}, data={"name": "gone"}).json()
    error = assert_error(caller.http.delete(f"/v1/datasets/{made['id']}"), 409, "in_use")
    assert error["status"] == "processing"
    assert error["job"] == made["job"]
    with transaction(engine) as session:
        upload_id = session.get_one(tables.Dataset, made["id"]).upload_id
        job = session.get_one(tables.Job, made["job"])
        job.status = "failed"
    answer = caller.http.delete(f"/v1/datasets/{made['id']}")
    assert answer.json() == {"id": made["id"], "object": "dataset", "deleted": True}
    for response in (
        caller.http.get(f"/v1/datasets/{made['id']}"),
        caller.http.delete(f"/v1/datasets/{made['id']}"),
        caller.http.get(f"/v1/datasets/{made['id']}/samples"),
    ):
        assert_error(response, 404, "not_found")
    with transaction(engine, read_only=True) as session:
        row = session.get_one(tables.Dataset, made["id"])
        assert row.deleted_at is not None
        assert row.name == "gone"
        assert session.get(tables.Upload, upload_id) is None
    again = caller.http.post("/v1/datasets", json={"name": "gone", "builtin": "digits"}).json()
    assert again["version"] == 2


def test_wake_ups_follow_the_commit(
    caller: Caller, service: Service, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:  # fmt: skip
    woken: list[tuple[str, bool, bool]] = []

    def wake(job_id: str, *, internal: bool) -> None:
        with transaction(engine, read_only=True) as session:
            visible = session.scalar(select(tables.Job.id).where(tables.Job.id == job_id)) is not None
        woken.append((job_id, internal, visible))

    monkeypatch.setattr(service.app.state.database.publisher, "wake", wake)
    made = caller.http.post("/v1/datasets", json={"name": "d", "builtin": "digits"}).json()
    assert woken == [(made["job"], True, True)]
