"""The client's manners: repeats, idempotency keys, errors, cursors. The server is a function from request to answer."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.client import Client, Damaged, Misplaced, Refused, Unreachable
from app.client.jobs import server_sent
from app.client.place import server_key, server_url

pytestmark = pytest.mark.unit

Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.client.connection.time.sleep", lambda _seconds: None)


def client(answer: Answer, *, patience: float = 60.0) -> Client:
    return Client("http://server", "ty_key", patience=patience, transport=httpx.MockTransport(answer))


def error(answered: int, code: str, **more: object) -> httpx.Response:
    body = {"type": "conflict", "code": code, "message": "No.", "param": None, "details": [], "request_id": "r1"}
    return httpx.Response(
        answered, json={"error": body | more}, headers={"Retry-After": "1"} if answered == 503 else {}
    )


def test_a_post_is_sent_again_under_the_same_idempotency_key() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) < 3:
            raise httpx.ReadError("cut")
        return httpx.Response(201, json={"id": "job_1"})

    with client(answer) as one:
        assert one.jobs.submit({"recipe": "x"})["id"] == "job_1"
        one.jobs.submit({"recipe": "x"})
    first, second, third, other = (request.headers["Idempotency-Key"] for request in seen)
    assert first == second == third != other
    assert {request.content for request in seen} == {b'{"recipe":"x"}'}


def test_passing_refusals_are_borne_with_and_others_are_not() -> None:
    answers = [error(503, "recipes_unavailable"), error(409, "idempotency_running"), error(409, "cannot_pause")]
    calls = iter(answers)
    with client(lambda _: next(calls)) as one, pytest.raises(Refused) as caught:
        one.jobs.pause("job_1")
    assert caught.value.code == "cannot_pause"
    assert next(calls, None) is None


def test_patience_ends_with_the_refusal_itself() -> None:
    with client(lambda _: error(503, "unavailable"), patience=0.5) as one, pytest.raises(Refused) as caught:
        one.me()
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (503, "unavailable", "r1")


def test_a_refusal_carries_the_whole_error_body() -> None:
    details = [{"pointer": "/training/epochs", "message": "give at least 1"}]
    answer = error(422, "invalid", details=details, param="training", status="queued")
    with client(lambda _: answer) as one, pytest.raises(Refused, match=r"^No\.$") as caught:
        one.jobs.submit({})
    assert caught.value.details == details
    assert caught.value.param == "training"
    assert caught.value.body["status"] == "queued"


def test_an_answer_that_is_not_ours_is_still_a_refusal() -> None:
    with (
        client(lambda _: httpx.Response(404, text="<h1>nginx</h1>")) as one,
        pytest.raises(Refused, match="404: <h1>nginx"),
    ):
        one.me()


def test_no_server_says_how_to_start_one() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client(answer) as one, pytest.raises(Unreachable, match="tuneyard up"):
        one.me()


def test_parameters_that_are_none_are_left_out_and_metadata_is_spelt_as_filters() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url.params))
        return httpx.Response(200, json={"data": [], "has_more": False, "last_id": None})

    with client(answer) as one:
        one.jobs.list(status=None, recipe="simclr", metadata={"run": "a"})
    assert httpx.QueryParams(seen[0]) == httpx.QueryParams({"limit": "20", "recipe": "simclr", "metadata[run]": "a"})


def test_each_follows_the_cursors() -> None:
    pages = {None: (["a", "b"], True), "b": (["c"], False)}

    def answer(request: httpx.Request) -> httpx.Response:
        ids, more = pages[request.url.params.get("after")]
        return httpx.Response(200, json={"data": [{"id": i} for i in ids], "last_id": ids[-1], "has_more": more})

    with client(answer) as one:
        assert [item["id"] for item in one.models.each()] == ["a", "b", "c"]


def test_waiting_polls_until_the_end() -> None:
    states = iter(["queued", "running", "succeeded"])
    waits: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        waits.append(request.url.params.get("wait"))
        return httpx.Response(200, json={"status": next(states)})

    seen: list[str] = []
    with client(answer) as one:
        assert one.jobs.wait("job_1", on_change=lambda job: seen.append(job["status"]))["status"] == "succeeded"
    assert seen == ["queued", "running", "succeeded"]
    assert waits == [None, "25", "25"]


def stream_of(*numbers: int, done: bool = False, cut: bool = False) -> httpx.Response:
    def lines():
        for number in numbers:
            kind = "done" if done and number == numbers[-1] else "log"
            data = json.dumps({"number": number, "type": kind})
            yield f"id: {number}\nevent: {kind}\ndata: {data}\n\n: alive\n\n".encode()
        if cut:
            yield b'id: 99\nevent: log\ndata: {"number": 99'
            raise httpx.ReadError("cut")

    return httpx.Response(200, content=lines())


def test_an_event_stream_goes_on_behind_the_last_event_seen() -> None:
    asked: list[str] = []
    streams = iter([stream_of(1, 2, cut=True), stream_of(3), stream_of(4, 5, done=True)])

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json={"status": "running"})
        asked.append(request.headers["Last-Event-ID"])
        return next(streams)

    with client(answer) as one:
        assert [event["number"] for event in one.jobs.events("job_1")] == [1, 2, 3, 4, 5]
    assert asked == ["0", "2", "3"]


def test_an_event_stream_behind_the_end_of_an_ended_job_ends() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, content=b": nothing more\n\n")
        return httpx.Response(200, json={"status": "succeeded"})

    with client(answer) as one:
        assert list(one.jobs.events("job_1", after=9)) == []


def test_server_sent_events_may_span_lines_and_lack_a_space() -> None:
    lines = ["id:1", 'data:{"a":', "data: 1}", "", ": comment", "", "data: 2"]
    assert list(server_sent(lines)) == [{"a": 1}]


class Store:
    """A server of one file that speaks ranges, cuts connections as often as it is told, and may lie."""

    def __init__(self, content: bytes, *, cuts: int = 0, ranges: bool = True) -> None:
        self.content, self.cuts, self.ranges = content, cuts, ranges
        self.asked: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        rest = self.content[start:]

        def pieces():
            if self.cuts:
                self.cuts -= 1
                yield rest[: len(rest) // 2]
                raise httpx.ReadError("cut")
            yield rest

        return httpx.Response(206 if start else 200, content=pieces())


def file_of(content: bytes) -> dict[str, object]:
    import hashlib

    return {"name": "model.safetensors", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_was_cut_off(tmp_path: Path, ranges: bool) -> None:
    content = bytes(range(256)) * 16
    store = Store(content, cuts=2, ranges=ranges)
    told: list[tuple[int, int]] = []
    with client(store) as one:
        path = one.models.fetch("mdl_1", file_of(content), tmp_path, advance=lambda *n: told.append(n))  # type: ignore[arg-type]
        assert path.read_bytes() == content
        before = len(store.asked)
        one.models.fetch("mdl_1", file_of(content), tmp_path)  # type: ignore[arg-type]
    assert store.asked[0] is None
    assert store.asked[1] == "bytes=2048-"
    assert told[-1] == (4096, 4096)
    assert len(store.asked) == before, "a file that is there already is not fetched again"
    assert list(tmp_path.iterdir()) == [path]


def test_a_download_that_does_not_match_its_digest_is_removed(tmp_path: Path) -> None:
    file = file_of(b"x" * 100)
    with client(Store(b"y" * 100)) as one, pytest.raises(Damaged, match="SHA-256"):
        one.models.fetch("mdl_1", file, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/b", ""])
def test_a_file_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with client(Store(b"y")) as one, pytest.raises(Damaged, match="impossible name"):
        one.models.fetch("mdl_1", file_of(b"y") | {"name": name}, tmp_path)  # type: ignore[arg-type]


def test_an_upload_is_streamed_told_and_rewound_for_a_repeat(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"z" * 300_000)
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        if len(bodies) == 1:
            raise httpx.WriteError("cut")
        return httpx.Response(202, json={"id": "ds_1"})

    told: list[tuple[int, int]] = []
    with client(answer) as one:
        one.datasets.upload(archive, "cats", metadata={"a": "b"}, advance=lambda *numbers: told.append(numbers))
    assert len(bodies) == 2
    assert all(body.count(b"z") >= 300_000 and b'{"a": "b"}' in body for body in bodies)
    assert told[-1] == (300_000, 300_000)
    assert (0, 300_000) in told[1:], "a repeat starts the count again"


def test_a_folder_travels_as_one_tar_that_is_always_the_same(tmp_path: Path) -> None:
    import io
    import tarfile

    folder = tmp_path / "pets"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"cat")
    (folder / "2.png").write_bytes(b"dog")
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = request.read()
        boundary = request.headers["Content-Type"].partition("boundary=")[2].encode()
        bodies.append(body.split(boundary)[2].partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0])
        return httpx.Response(202, json={})

    with client(answer) as one:
        one.datasets.upload(folder, "pets")
        (folder / "2.png").touch()
        one.datasets.upload(folder, "pets")
    assert bodies[0] == bodies[1]
    with tarfile.open(fileobj=io.BytesIO(bodies[0])) as archive:
        assert archive.getnames() == ["2.png", "cat/1.png"]


def test_the_address_and_the_key_come_from_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNEYARD_URL", "TUNEYARD_KEY", "TUNEYARD_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Misplaced, match="tuneyard up"):
        server_key(home=tmp_path)
    assert server_url(home=tmp_path) == "http://127.0.0.1:8000"
    (tmp_path / "key").write_text("ty_home\n")
    (tmp_path / "url").write_text("http://127.0.0.1:4711\n")
    assert server_key(home=tmp_path) == "ty_home"
    assert server_url(home=tmp_path) == "http://127.0.0.1:4711"
    monkeypatch.setenv("TUNEYARD_KEY", "ty_env")
    monkeypatch.setenv("TUNEYARD_URL", "http://elsewhere/")
    assert (server_key(home=tmp_path), server_url(home=tmp_path)) == ("ty_env", "http://elsewhere")
    assert (server_key("ty_given", tmp_path), server_url("http://given", tmp_path)) == ("ty_given", "http://given")
