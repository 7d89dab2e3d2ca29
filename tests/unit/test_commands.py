"""How the command line shows and reads things; nothing is sent anywhere."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from app.cli import application
from app.client import Misplaced
from app.commands import datasets, doctor, jobs, keys, models, projects, recipes, workers
from app.commands.bars import JobBoard, job_facts, job_fraction, job_line
from app.commands.training import LocalRun

pytestmark = pytest.mark.unit

JOB: dict[str, Any] = {
    "id": "job_1", "name": "cats", "recipe": "simclr", "recipe_version": "1", "kind": "pretrain", "dataset": "ds_1",
    "status": "running", "wanted": "run", "status_reason": None, "queue": None, "model": None, "result": None,
    "progress": {"fraction": 0.3, "phase": "train", "step": 120, "steps": 4000, "epoch": 1, "epochs": 10,
                 "samples_per_second": 1024.4, "eta_seconds": 12.0, "updated_at": "2026-11-22T12:00:00Z"},
    "metrics": {"train/loss": 1.23456}, "best": {"metric": "validation/accuracy", "value": 0.9, "step": 100},
    "attempt": 1, "max_attempts": 20, "exact": True, "worker": "wrk_1", "error": None, "spec": {}, "plan": None,
    "created_at": "2026-11-22T12:00:00Z", "started_at": None, "finished_at": None,
}  # fmt: skip
DATASET: dict[str, Any] = {
    "id": "ds_1", "name": "[bold]digits", "version": 2, "status": "failed", "task": "image_classification",
    "format": "folder", "bytes": 1_200_000, "sha256": None, "samples": 1797, "splits": {"train": 1297, "test": 500},
    "classes": [str(n) for n in range(25)], "report": {"corrupt": [{"path": "a.png"}], "counts": {"train": 1297}},
    "error": {"class": "data", "code": "empty", "message": "No image in [a].", "hint": "Add some."},
    "created_at": "2026-11-22T12:00:00Z",
}  # fmt: skip
MODEL: dict[str, Any] = {
    "id": "mdl_1", "name": "cats", "version": 1, "status": "ready", "task": "image_classification", "parameters": 9610,
    "architecture": {"architecture": "resnet18", "stem": "small"}, "classes": ["cat", "dog"], "error": None,
    "metrics": {"test/accuracy": 0.95}, "files": [{"name": "model.safetensors", "bytes": 1000, "sha256": "0"}],
    "lineage": {"job": "job_1", "base_model": None}, "visibility": "private", "created_at": "2026-11-22T12:00:00Z",
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "simclr", "kind": "pretrain", "version": "1", "summary": "Two views.", "tasks": ["unlabelled_images"],
    "schema": {"properties": {"params": {"$ref": "#/$defs/P"}},
               "$defs": {"P": {"properties": {"temperature": {"default": 0.5, "description": "Of NT-Xent."}}}}},
    "defaults": {}, "template": {"recipe": "simclr", "dataset": "ds_…"}, "requires": {"min_batch": 2, "reason": None},
}  # fmt: skip


def text_of(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_running_job_in_one_line() -> None:
    line = job_line(JOB)
    assert line == "cats  running  train  30%  120/4,000  loss 1.235  1,024 samples/s  ETA 0:12"


def test_a_job_that_has_not_begun_says_no_more_than_is_known() -> None:
    waiting = JOB | {"status": "queued", "progress": None, "metrics": {}, "status_reason": "no_worker_fits"}
    assert job_line(waiting) == "cats  queued  0%  (no_worker_fits)"


def test_an_ended_job_has_no_eta_and_is_whole() -> None:
    ended = JOB | {"status": "succeeded"}
    assert job_fraction(ended) == 1.0
    assert job_facts(ended)["eta"] == job_facts(ended)["speed"] == ""


def test_without_a_terminal_the_board_says_a_line_per_change_and_not_per_look() -> None:
    console = Console(file=io.StringIO(), width=80)
    with JobBoard(console) as board:
        for _ in range(50):
            board.show(JOB)
        board.show(JOB | {"status": "succeeded"})
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[1] for line in lines] == ["running", "succeeded"]


def test_on_a_terminal_the_board_draws_a_bar_per_job() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None)
    with JobBoard(console) as board:
        board.show(JOB)
        board.show(JOB | {"id": "job_2", "name": "dogs"})
        board.say("dogs: plan [fixed]")
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cats" in drawn
    assert "120/4,000" in drawn
    assert "dogs: plan [fixed]" in drawn


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (jobs.show_list([JOB]), ["job_1", "simclr", "30%", "validation/accuracy 0.9"]),
        (jobs.show_one(JOB), ["train/loss  1.235", "1 of 20"]),
        (jobs.show_one(JOB | {"error": DATASET["error"]}), ["data, empty: No image in [a]."]),
        (jobs.show_one(JOB | {"exact": False}), ["1 of 20, not exact"]),
        (datasets.show_list([DATASET]), ["[bold]digits", "1,797", "25", "1.2 MB"]),
        (datasets.show_one(DATASET), ["train 1,297  test 500", "No image in [a].", "Add some.", "(25)", "a.png"]),
        (models.show_list([MODEL]), ["mdl_1", "resnet18", "9,610", "test/accuracy 0.95"]),
        (models.show_one(MODEL), ['{"architecture": "resnet18"', "model.safetensors  1.0 kB", "job job_1", "cat, dog"]),
        (recipes.show_list([RECIPE]), ["simclr", "pretrain", "Two views."]),
        (recipes.show_one(RECIPE), ["temperature", "0.5", "Of NT-Xent.", '"min_batch": 2', '"dataset": "ds_…"']),
        (keys.show_list([{"id": "key_1", "name": "ci", "prefix": "ty_ab", "scopes": ["read", "write"],
                          "created_at": "2026-11-22T12:00:00Z"}]), ["key_1", "ty_ab…", "read, write"]),
        (projects.show_list([{"id": "prj_1", "name": "wild", "created_at": "2026-11-22T12:00:00Z"}]), ["wild"]),
        (workers.show_list([{"id": "wrk_1", "host": "h", "slots": 2, "busy": 1, "gpus": [{"name": "H200"}],
                             "versions": {"torch": "2.15"}, "draining": True, "alive": True}]),
         ["1/2", "H200", "2.15", "draining"]),
        (doctor.show([{"name": "torch", "state": "missing", "message": "not there", "remedy": "get it"}]),
         ["missing", "torch: get it", "Something that is needed is missing."]),
        (doctor.show_measured({"memo": "/home/cache/tuning.json", "rows": [
            {"family": "mlp", "precision": "float32", "memory_format": "contiguous", "threads": 1, "compile": False,
             "samples_per_second": 12345.6}]}),
         ["mlp", "12,346", "/home/cache/tuning.json"]),
    ],
)  # fmt: skip
def test_what_is_shown_says_what_matters(shown: Any, said: list[str]) -> None:
    text = text_of(shown)
    for words in said:
        assert words in text


def test_a_field_is_laid_over_a_job() -> None:
    body: dict[str, Any] = {"training": {"epochs": 1, "seed": 3}}
    for change in ("training.epochs=5", "params.temperature=0.2", "name=cats and dogs", 'model={"a": [1]}'):
        jobs.set_field(body, change)
    assert body == {
        "training": {"epochs": 5, "seed": 3}, "params": {"temperature": 0.2}, "name": "cats and dogs",
        "model": {"a": [1]},
    }  # fmt: skip


@pytest.mark.parametrize("change", ["epochs", "a..b=1", "=1", "name.first=x"])
def test_a_change_that_cannot_be_laid_over_is_a_usage_error(change: str) -> None:
    with pytest.raises(typer.BadParameter):
        jobs.set_field({"name": "cats"}, change)


@pytest.mark.parametrize(("content", "why"), [("{", "not a readable JSON file"), ("[1]", "must hold a JSON object")])
def test_a_spec_that_is_no_json_object_names_its_file(tmp_path: Path, content: str, why: str) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(content)
    with pytest.raises(Misplaced, match=why):
        jobs.read_spec(str(spec))


def test_a_local_run_is_shown_as_a_job() -> None:
    view = LocalRun("spec")
    progress = {"type": "progress", "phase": "train", "fraction": 0.5, "step": 1, "steps": 2}
    assert view.hear(progress) is None
    view.hear({"type": "metrics", "rows": [["train/loss", 1, 0.25], ["train/loss", 2, 0.125]]})
    assert view.hear({"type": "event", "code": "x", "message": "plan made", "level": "info", "data": {}}) == "plan made"
    assert job_line(view.job) == "spec  running  train  50%  1/2  loss 0.125"
    finished = {"type": "finished", "outcome": "succeeded", "metrics": {}}
    assert view.hear({**finished, "result": {"sentence": "It pays."}}) == "It pays."
    assert view.hear({**finished, "result": None}) is None
    view.hear({"type": "failed", "error": {"fault": "user", "code": "c", "message": "m", "hint": None}})
    assert view.job["status"] == "failed"
    assert view.job["error"]["class"] == "user"


def all_commands() -> list[list[str]]:
    found = [[command.name or ""] for command in application.registered_commands]
    for group in application.registered_groups:
        assert group.typer_instance is not None
        found += [[group.name or "", command.name or ""] for command in group.typer_instance.registered_commands]
    return found


def test_the_promised_commands_are_there() -> None:
    names = {" ".join(words) for words in all_commands()}
    promised = """up|worker|run|doctor|datasets push|datasets list|datasets show|datasets delete|jobs submit|
        jobs list|jobs show|jobs watch|jobs cancel|jobs stop|jobs pause|jobs resume|jobs retry|jobs events|
        models list|models show|models pull|models import|recipes list|recipes show|
        keys create|keys list|keys revoke|projects create|projects list|projects delete|db upgrade"""
    assert {name.strip() for name in promised.split("|")} <= names


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_explains_itself_and_answers_in_json(words: list[str]) -> None:
    done = CliRunner().invoke(application, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    assert words == ["worker"] or "--json" in done.output


def test_a_failure_is_a_message_and_a_code(tmp_path: Path) -> None:
    arguments = ["jobs", "list", "--home", str(tmp_path), "--json"]
    done = CliRunner().invoke(application, arguments, env={"TUNEYARD_KEY": None, "TUNEYARD_URL": None})
    assert done.exit_code == 1
    assert "No key" in json.loads(done.stdout)["error"]["message"]
    assert "No key" in done.stderr


def test_a_wrong_call_is_a_usage_error() -> None:
    assert CliRunner().invoke(application, ["jobs", "shwo"]).exit_code == 2
    assert CliRunner().invoke(application, ["datasets", "push"], env={"TUNEYARD_KEY": "ty_x"}).exit_code == 2
