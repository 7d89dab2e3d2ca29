"""A run with no server: what the API would refuse is refused here in the same words, most of it before data is read."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import application
from app.domain.errors import UserFault
from tests.worker import models, sets
from worker.trainer import local
from worker.trainer.__main__ import arguments

pytestmark = pytest.mark.worker

CNN = {"architecture": "small_cnn", "width": 0.25}


def run(
    spec: dict[str, Any], data: Path | str, folder: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> list[dict[str, Any]]:
    """Run a spec; give what was said."""
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    given = [
        "run",
        str(path),
        "--data",
        str(data),
        "--out",
        str(folder / "out"),
        "--threads",
        "1",
        "--device",
        "cpu",
        *more,
    ]
    code = local.run(arguments(given))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (code, said[-1]["type"]) in ((0, "finished"), (1, "failed"))
    return said


def refused(spec: dict[str, Any], data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    last = run(spec, data, folder, capsys)[-1]
    assert last["type"] == "failed"
    assert last["error"]["fault"] == "user"
    return last["error"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            {"recipe": "simclr", "model": {"architecture": "small_cn"}},
            "model.architecture: Unknown architecture 'small_cn'",
        ),
        ({"recipe": "simclr", "model": CNN, "trainning": {}}, "trainning: Unknown field; did you mean training?"),
        (
            {"recipe": "simclr", "model": CNN, "training": {"preset": "fast"}},
            "training.preset: The preset fast is made for",
        ),
        ({"recipe": "simclr"}, "model: Give a network to start from"),
        ({"recipe": "mae", "model": CNN}, "model.architecture: small_cnn is a convolutional network"),
        (
            {
                "recipe": "semi_supervised",
                "model": CNN,
                "params": {"objective": "simclr", "objective_params": {"temperatur": 1}},
            },
            "params.objective_params.temperatur: Unknown field; did you mean temperature?",
        ),
        (
            {"recipe": "semi_supervised", "model": CNN, "params": {"objective": "gan"}},
            "params.objective: gan cannot take turns with another loss, because its networks play against each other",
        ),
        (
            {"recipe": "method_race", "model": CNN, "params": {"methods": [{"recipe": "simclr"}, {"recipe": "mae"}]}},
            "params.methods.1.recipe: small_cnn is a convolutional network",
        ),
    ],
)
def test_a_wrong_body_is_refused_before_the_data_is_read(
    spec: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(spec, tmp_path / "no such folder", tmp_path, capsys)
    assert error["message"].startswith(says)


def test_the_body_of_a_job_runs_with_what_stands_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"recipe": "embed", "dataset": "ds_…", "model": "mdl_…", "params": {"splits": ["test"]}}
    error = refused(body, tmp_path / "no such folder", tmp_path, capsys)
    assert error["message"] == "model: there is no server here that knows mdl_…."
    assert "--model" in error["hint"]
    models.random(tmp_path / "model")
    last = run(body, "builtin:digits", tmp_path, capsys, "--model", str(tmp_path / "model"))[-1]
    assert last["result"]["samples"] == 500
    assert (tmp_path / "out" / "embedding.parquet").is_file()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"recipe": "simclr", "model": CNN}, "dataset: simclr needs at least 4 training samples; there are 3."),
        ({"recipe": "deepcluster", "model": CNN, "params": {"clusters": 3}}, "params.clusters: There are 3 samples"),
        ({"recipe": "image_classification", "model": CNN}, "dataset: image_classification needs labels"),
    ],
)
def test_what_the_data_cannot_give_is_refused_before_training(
    spec: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(sets.encoded(sets.digits()["train"][0][number]))
    assert refused(spec, images, tmp_path, capsys)["message"].startswith(says)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"recipe": "\xff"}'], ids=["none", "cut", "list", "bytes"])
def test_a_body_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserFault, match=str(path)) as caught:
        local.read_body(path)
    assert (caught.value.code, caught.value.phase) == ("invalid_spec", "read")


def test_a_disk_that_is_full_while_the_data_is_read_is_not_blamed_on_the_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local.ingest, "ingest_folder", full)
    last = run({"recipe": "simclr", "model": CNN}, tmp_path, tmp_path, capsys)[-1]
    assert (last["error"]["fault"], last["error"]["code"]) == ("resource", "disk_full")


@pytest.mark.parametrize(("room", "streamed"), [("0", True), (None, False)])
def test_the_disk_budget_is_the_setting_that_its_messages_name(
    room: str | None, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if room is not None:
        monkeypatch.setenv("TUNEYARD_CACHE_BYTES", room)
    said = run(sets.spec(training={"steps": 1}), "builtin:digits", tmp_path, capsys)
    assert ("data.streaming" in [each.get("code") for each in said]) == streamed


def test_what_a_killed_run_left_is_not_taken_for_this_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = tmp_path / "out" / ".work" / "children" / "0.1"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"of another job")
    run(sets.spec(training={"steps": 1}), "builtin:digits", tmp_path, capsys)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "children").exists()


def test_the_command_finds_what_was_decoded_before_in_the_homes_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, home = sets.spec(training={"steps": 1}), tmp_path / "home"
    before = run(spec, "builtin:digits", tmp_path, capsys, "--cache", str(home / "cache"))
    given = ["run", str(tmp_path / "spec.json"), "--data", "builtin:digits", "--home", str(home), "--json"]
    done = CliRunner().invoke(application, [*given, "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    after = [json.loads(line) for line in done.output.splitlines()]
    first, second = ({each["code"] for each in said if each["type"] == "event"} for said in (before, after))
    assert first & {"data.decoded", "data.cached"} == {"data.decoded"}
    assert second & {"data.decoded", "data.cached"} == {"data.cached"}
    assert not (tmp_path / "again" / ".cache").exists()
