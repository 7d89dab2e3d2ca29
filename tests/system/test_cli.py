"""The command line against a running stack: what it prints, what it returns, where it can be run."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import application
from tests.system.up import TUNEYARD, Up, environment, running

pytestmark = pytest.mark.system

FINE_TUNING = {
    "recipe": "image_classification", "model": {"architecture": "small_cnn", "width": 0.25},
    "training": {"epochs": 1, "batch_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Run one stack for this module, with the digits in it."""
    with running(tmp_path_factory.mktemp("stack") / "home") as up:
        done = call(up, "datasets", "push", "--builtin", "digits", "--json")
        assert json.loads(done.stdout)["status"] == "ready"
        yield up


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def call(stack: Up, *words: str, stdin: str | None = None) -> Done:
    """Run one command in this process, which is quicker; the server and the key are found through the home."""
    done = CliRunner().invoke(application, words, input=stdin, env=settings(stack.home))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


def process(home: Path, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one command as a process of its own."""
    return subprocess.run(
        [*TUNEYARD, *words], env=environment(home) | more, cwd=cwd, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def settings(home: Path) -> dict[str, str | None]:
    """Give what to change in this process's environment: nothing of the developer's own."""
    cleared: dict[str, str | None] = {name: None for name in os.environ if name.startswith("TUNEYARD_")}
    return cleared | {"TUNEYARD_HOME": str(home), "COLUMNS": "200"}


def answer(stack: Up, *words: str, stdin: str | None = None) -> Any:
    """Run one command that must succeed with exactly one JSON document on standard output."""
    done = call(stack, *words, "--json", stdin=stdin)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_job_from_a_file_to_weights_on_disk(stack: Up, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(FINE_TUNING))
    job = answer(stack, "jobs", "submit", str(spec), "--dataset", "digits", "--set", "name=mine")
    assert (job["name"], job["spec"]["training"]["epochs"]) == ("mine", 1)

    watched = process(stack.home, "jobs", "watch", job["id"], cwd=tmp_path)
    assert watched.returncode == 0, watched.stderr
    assert "succeeded" in watched.stdout
    assert "test/accuracy" in watched.stdout
    assert "\x1b[" not in watched.stdout, "no terminal, no escapes"

    ended = answer(stack, "jobs", "show", job["id"])
    pulled = call(stack, "models", "pull", ended["model"], "--to", str(tmp_path / "weights"))
    assert pulled.returncode == 0, pulled.stderr
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "metrics.json"}
    assert answer(stack, "models", "show", "mine")["id"] == ended["model"]
    assert call(stack, "models", "list").stdout.count("mdl_") >= 1


def test_watching_in_json_gives_every_event_and_then_the_job(stack: Up) -> None:
    job = answer(stack, "jobs", "submit", "-", "--dataset", "digits", stdin=json.dumps(FINE_TUNING))
    done = call(stack, "jobs", "watch", job["id"], "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["number"] for line in lines[:-1]] == list(range(1, len(lines)))
    assert lines[-2]["type"] == "done"
    assert (lines[-1]["object"], lines[-1]["status"]) == ("job", "succeeded")
    events = [json.loads(line) for line in call(stack, "jobs", "events", job["id"], "--json").stdout.splitlines()]
    assert events == lines[:-1]


def test_a_failed_job_is_exit_code_3_and_says_why(stack: Up) -> None:
    done = call(
        stack, "jobs", "submit", "-", "--dataset", "digits", "--set", "training.learning_rate=1e30", "--watch",
        "--set", "training.optimizer=sgd", stdin=json.dumps(FINE_TUNING),
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "user" in done.stderr
    assert "learning rate" in done.stderr.lower().replace("_", " ")


def test_a_cancelled_job_is_exit_code_4(stack: Up) -> None:
    job = answer(stack, "jobs", "submit", "-", "--dataset", "digits", "--set", "training.epochs=10000",
                 stdin=json.dumps(FINE_TUNING))  # fmt: skip
    assert answer(stack, "jobs", "cancel", job["id"])["wanted"] == "cancel"
    done = call(stack, "jobs", "watch", job["id"])
    assert done.returncode == 4, done.stderr
    again = call(stack, "jobs", "pause", job["id"], "--json")
    assert again.returncode == 1
    assert json.loads(again.stdout)["error"]["status"] == "cancelled"


def test_a_refusal_names_the_field_and_is_exit_code_1(stack: Up) -> None:
    arguments = ["jobs", "submit", "-", "--dataset", "digits", "--set", "training.epochs=0"]
    done = call(stack, *arguments, stdin=json.dumps(FINE_TUNING))
    assert (done.returncode, done.stdout) == (1, "")
    assert "/training/epochs" in done.stderr
    assert "Traceback" not in done.stderr
    said = call(stack, *arguments, "--json", stdin=json.dumps(FINE_TUNING))
    assert json.loads(said.stdout)["error"]["details"][0]["pointer"] == "/training/epochs"


@pytest.mark.parametrize(
    "words",
    [["jobs", "show", "job_00000000000000000000000000"], ["datasets", "show", "nothing"], ["models", "pull", "nothing"],
     ["datasets", "push", "/nowhere/at/all"], ["jobs", "submit", "/nowhere.json"],
     ["jobs", "list", "--key", "ty_wrong"], ["recipes", "show", "simcrl"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_not_there_is_exit_code_1_with_one_clear_line(stack: Up, words: list[str]) -> None:
    done = call(stack, *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("words", [["jobs"], ["jobs", "shwo"], ["jobs", "show"], ["jobs", "list", "--limit", "0"]])
def test_a_wrong_call_is_exit_code_2(stack: Up, words: list[str]) -> None:
    assert call(stack, *words).returncode == 2


def test_lists_show_and_serialise(stack: Up) -> None:
    for noun in ("datasets", "jobs", "models", "recipes", "keys", "projects", "workers"):
        page = answer(stack, noun, "list")
        assert page["object"] == "list"
        done = call(stack, noun, "list")
        assert done.returncode == 0, done.stderr
        for item in page["data"]:
            assert (item.get("id") or item["name"]) in done.stdout
    assert answer(stack, "recipes", "show", "simclr")["name"] == "simclr"
    assert "temperature" in call(stack, "recipes", "show", "simclr").stdout
    assert answer(stack, "datasets", "show", "digits")["samples"] == 1797


def test_a_key_is_made_used_and_revoked(stack: Up) -> None:
    made = answer(stack, "keys", "create", "reader", "--scope", "read")
    assert call(stack, "jobs", "list", "--key", made["key"]).returncode == 0
    refused = call(stack, "jobs", "submit", "-", "--dataset", "digits", "--key", made["key"], "--json",
                   stdin=json.dumps(FINE_TUNING))  # fmt: skip
    assert json.loads(refused.stdout)["error"]["type"] == "permission"
    answer(stack, "keys", "revoke", made["id"])
    assert call(stack, "jobs", "list", "--key", made["key"]).returncode == 1


def test_a_folder_is_pushed(stack: Up, tmp_path: Path) -> None:
    import base64

    pixel = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNiAAAABgADNjd8qAAAAABJRU5ErkJggg=="
    )
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.png").write_bytes(pixel)
    made = answer(stack, "datasets", "push", str(tmp_path / "pets"))
    assert (made["name"], made["classes"], made["status"]) == ("pets", ["cat", "dog"], "ready")
    assert answer(stack, "datasets", "delete", "pets")["deleted"] is True


def test_the_doctor_finds_the_stack_healthy(stack: Up) -> None:
    found = answer(stack, "doctor")
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert found["ok"] is True
    assert {"python", "torch", "threads", "redis program", "disk", "database", "schema", "server", "workers"} <= set(
        states
    )
    assert states["schema"] == states["workers"] == states["torch"] == "ok"


def test_the_doctor_says_what_is_missing(tmp_path: Path) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none"
    done = process(tmp_path, "doctor", "--json", cwd=tmp_path, TUNEYARD_DATABASE_URL=url)
    assert done.returncode == 1
    database = next(one for one in json.loads(done.stdout)["findings"] if one["name"] == "database")
    assert database["state"] == "missing"
    assert database["remedy"]


def test_a_run_without_any_server(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(FINE_TUNING))
    words = ["run", "spec.json", "--data", "builtin:digits", "--out", "made"]
    done = process(tmp_path, *words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    assert kinds[-1] == "finished"
    assert {"planned", "progress", "metrics"} <= set(kinds)
    assert (tmp_path / "made" / "model.safetensors").stat().st_size > 1000

    spec.write_text(json.dumps(FINE_TUNING | {"params": {"trainable": "nothing"}}))
    failed = process(tmp_path, *words, cwd=tmp_path)
    assert failed.returncode == 3, failed.stderr
    assert "trainable" in failed.stderr


def test_ctrl_c_in_a_run_without_a_server_keeps_the_model(tmp_path: Path) -> None:
    endless = FINE_TUNING | {"training": FINE_TUNING.get("training", {}) | {"epochs": 50_000}}
    (tmp_path / "spec.json").write_text(json.dumps(endless))
    with subprocess.Popen(
        [*TUNEYARD, "run", "spec.json", "--data", "builtin:digits", "--out", "made", "--json"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment(tmp_path),
    ) as run:  # fmt: skip
        assert run.stdout is not None
        lines: list[dict[str, object]] = []
        for line in run.stdout:
            lines.append(json.loads(line))
            if lines[-1].get("code") == "train.first_step":
                run.send_signal(signal.SIGINT)
    assert run.returncode == 0
    assert (lines[-1]["type"], lines[-1]["outcome"]) == ("finished", "stopped")
    assert (tmp_path / "made" / "model.safetensors").stat().st_size > 1000
