"""Browsing a dataset: pages of samples, filters, pictures and thumbnails."""

from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.store.blobs import Blobs
from app.store.session import transaction
from tests import factories
from tests.routes.conftest import Caller, Service, assert_error
from tests.routes.shards import PICTURE, THUMBNAIL, publish

pytestmark = pytest.mark.routes

TRAIN = [0, 1, None, 1, 0, None, 1, 0, 0, None]
TEST = [1, 0, 1]
LABELS: list[int | None] = [*TRAIN, *TEST]


@pytest.fixture
def path(caller: Caller, engine: Engine, blobs: Blobs) -> str:
    """Give the path of a dataset of ten training and three test samples."""
    with transaction(engine) as session:
        project = session.get_one(factories.tables.Project, caller.project)
        dataset = factories.make_dataset(session, project, ready=False)
    with transaction(engine) as session:
        publish(engine, blobs, session, dataset, {"train": TRAIN, "test": TEST})
    return f"/v1/datasets/{dataset.id}"


def numbers(client: httpx.Client, path: str, **query: Any) -> list[int]:
    """Follow the cursor to the end."""
    seen: list[int] = []
    while True:
        page = client.get(f"{path}/samples", params=query).json()
        seen += [item["number"] for item in page["data"]]
        if not page["has_more"]:
            return seen
        query["after"] = page["last_id"]


def test_the_dataset_shows_its_facts(client: httpx.Client, path: str) -> None:
    shown = client.get(path).json()
    assert (shown["status"], shown["samples"], shown["classes"]) == ("ready", 13, ["cat", "dog"])
    assert shown["splits"] == {"train": 10, "test": 3}
    assert shown["features"] == {"image": "image", "label": "class"}
    assert shown["report"] == {"corrupt": []}
    assert shown["sha256"] == "a" * 64
    assert shown["bytes"] > 0


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 13, 100])
def test_pages_cover_everything_once(client: httpx.Client, path: str, limit: int) -> None:
    assert numbers(client, path, limit=limit) == list(range(13))


def test_a_sample(client: httpx.Client, path: str) -> None:
    page = client.get(f"{path}/samples", params={"limit": 2, "after": 9}).json()
    assert page == {
        "object": "list", "first_id": "10", "last_id": "11", "has_more": True,
        "data": [
            {"object": "sample", "number": 10, "split": "test", "label": 1, "class": "dog", "path": "test/0.png"},
            {"object": "sample", "number": 11, "split": "test", "label": 0, "class": "cat", "path": "test/1.png"},
        ],
    }  # fmt: skip
    unlabelled = client.get(f"{path}/samples", params={"label": "unlabelled", "limit": 1}).json()["data"][0]
    assert (unlabelled["number"], unlabelled["label"], unlabelled["class"]) == (2, None, None)


@pytest.mark.parametrize(
    ("query", "keep"),
    [
        ({"split": "train"}, lambda n: n < 10),
        ({"split": "test"}, lambda n: n >= 10),
        ({"split": "validation"}, lambda n: False),
        ({"label": "cat"}, lambda n: LABELS[n] == 0),
        ({"label": "1"}, lambda n: LABELS[n] == 1),
        ({"label": "unlabelled"}, lambda n: LABELS[n] is None),
        ({"label": "dog", "split": "test"}, lambda n: n >= 10 and LABELS[n] == 1),
    ],
)
@pytest.mark.parametrize("limit", [1, 2, 20])
def test_filters(client: httpx.Client, path: str, query: dict[str, str], keep: Any, limit: int) -> None:
    assert numbers(client, path, limit=limit, **query) == [n for n in range(13) if keep(n)]


def test_pictures(client: httpx.Client, path: str) -> None:
    original = client.get(f"{path}/samples/11/image")
    assert original.content == PICTURE % (1, b"test")
    assert original.headers["content-type"] == "image/png"
    assert original.headers["x-content-type-options"] == "nosniff"
    assert original.headers["cache-control"].startswith("private")
    small = client.get(f"{path}/samples/7/image", params={"size": "thumbnail"})
    assert small.content == THUMBNAIL % (7, b"train")
    assert small.headers["content-type"] == "image/jpeg"
    assert_error(client.get(f"{path}/samples/13/image"), 404, "no_such_sample")
    for bad in (f"{path}/samples/-1/image", f"{path}/samples/x/image", f"{path}/samples/1/image?size=huge"):
        assert_error(client.get(bad), 422)


def test_bad_queries(client: httpx.Client, path: str) -> None:
    error = assert_error(client.get(f"{path}/samples", params={"label": "dgo"}), 422)
    assert "dog" in error["message"]
    for query in ({"split": "dev"}, {"limit": 0}, {"after": -1}, {"after": "x"}, {"after": 10**30}):
        assert_error(client.get(f"{path}/samples", params=query), 422)


def test_only_a_ready_dataset_can_be_browsed(client: httpx.Client) -> None:
    made = client.post("/v1/datasets", json={"name": "d", "builtin": "digits"}).json()
    for path in ("samples", "samples/0/image"):
        error = assert_error(client.get(f"/v1/datasets/{made['id']}/{path}"), 409, "dataset_not_ready")
        assert error["status"] == "processing"


def test_a_remote_store_is_read_through_the_cache(
    client: httpx.Client, path: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.app.state.blobs, "path", lambda sha256: None)
    assert numbers(client, path, label="dog") == [n for n in range(13) if LABELS[n] == 1]
    assert client.get(f"{path}/samples/12/image").content == PICTURE % (2, b"test")
    assert list((service.settings.home_path / "cache" / "blobs").iterdir())
