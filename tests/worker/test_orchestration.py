"""Jobs made of other jobs, in the trainer and with no server: rounds, what goes on to a child, what a failure means."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from tests.worker import sets
from worker import catalogue
from worker.recipe import Child, Facts, Gathered, Params, Recipe, Requires
from worker.report import Event, Failed, Finished, Order, Progress
from worker.trainer import __main__, alone, local, orchestration, process

pytestmark = pytest.mark.worker


class TreeParams(Params):
    rounds: int = Field(default=2, ge=1, le=5, description="Rounds, each of two jobs.")
    wrong: dict[str, Any] = Field(default={}, description="Laid over the body of every child.")


def plan(params: TreeParams, facts: Facts, finished: Sequence[Child]) -> list[dict[str, Any]]:
    """Two jobs; every later round starts from the model of the best of the round before."""
    models: list[Any] = [facts.model or sets.NETWORK]
    wanted: list[dict[str, Any]] = []
    for number in range(params.rounds):
        bodies = [
            {
                "child_key": f"{number}.{side}", "recipe": "image_classification", "model": models[-1],
                "training": {"steps": 2, "batch_size": 16, "seed": side}, **params.wrong,
            }
            for side in range(2)
        ]  # fmt: skip
        wanted += bodies
        made = [child for child in finished if child.key.startswith(f"{number}.") and child.model]
        if not made:
            break
        models.append(made[0].model)
    return wanted


def gather(params: TreeParams, facts: Facts, children: Sequence[Child]) -> Gathered:
    accuracies = {child.key: child.metrics.get("test/accuracy") for child in children}
    return Gathered(
        {"accuracies": accuracies, "failed": {child.key: child.why for child in children if not child.ended_well}},
        {"tree/children": len(children)}, {"tree.txt": ("text/plain", " ".join(accuracies).encode())},
    )  # fmt: skip


TREE = Recipe(
    name="tree", kind="apply", version="1", summary="A test.", tasks=("image_classification",), Params=TreeParams,
    requires=Requires(labels=True), plan=plan, gather=gather,
)  # fmt: skip


@pytest.fixture(autouse=True)
def with_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**catalogue.recipes(), "tree": TREE}
    monkeypatch.setattr(catalogue, "recipes", lambda: known)


def order(digits: DatasetFacts, folder: Path, *ended: dict[str, Any], **params: Any) -> Order:
    body = {"recipe": "tree", "params": params, "resources": {"device": "cpu"}}
    return sets.order(body, digits, folder, children=ended)


def ended(key: str, status: str = "succeeded", **more: Any) -> dict[str, Any]:
    return {
        "key": key, "job": f"job_{key}", "status": status, "spec": {}, "best": None, "result": {},
        "metrics": {"test/accuracy": 0.5}, "model": f"mdl_{key}" if status == "succeeded" else None, "error": None,
    } | more  # fmt: skip


def test_only_new_children_are_asked_for_and_each_is_complete(digits: DatasetFacts, tmp_path: Path) -> None:
    heard, last = sets.carry_out(order(digits, tmp_path))
    assert isinstance(last, Finished)
    assert (last.outcome, [body["child_key"] for body in last.children]) == ("children", ["0.0", "0.1"])
    assert last.children[0]["resources"]["device"] == "cpu"
    assert set(last.children[0]) == {"child_key", "recipe", "model", "training", "dataset", "resources"}
    assert heard.codes() == ["children.planned"]
    heard, last = sets.carry_out(order(digits, tmp_path, ended("0.0"), ended("0.1")))
    assert isinstance(last, Finished)
    assert [body["child_key"] for body in last.children] == ["1.0", "1.1"]
    assert {body["model"] for body in last.children} == {"mdl_0.0"}
    assert heard.of(Progress)[-1].fraction == 0.5
    assert sets.carry_out(order(digits, tmp_path, ended("0.0"), ended("0.1")))[1] == last, "the same every time"


def test_a_job_without_a_new_child_gathers(digits: DatasetFacts, tmp_path: Path) -> None:
    lost = ended("1.1", "failed", error={"message": "It diverged."})
    given = order(digits, tmp_path, ended("0.0"), ended("0.1"), ended("1.0"), lost)
    heard, last = sets.carry_out(given)
    assert isinstance(last, Finished)
    assert (last.outcome, last.metrics) == ("succeeded", {"tree/children": 4})
    assert last.result is not None
    assert last.result["failed"] == {"1.1": "It diverged."}
    assert [(file.name, file.media_type) for file in last.files] == [("tree.txt", "text/plain")]
    assert (Path(given.scratch) / "tree.txt").read_text() == "0.0 0.1 1.0 1.1"
    (event,) = heard.of(Event)
    assert (event.code, event.level) == ("children.ended", "warning")
    assert "3 of 4" in event.message
    assert "1.1 failed: It diverged." in event.message


def test_a_cancelled_child_says_so(digits: DatasetFacts, tmp_path: Path) -> None:
    _, last = sets.carry_out(order(digits, tmp_path, ended("0.0", "cancelled"), ended("0.1", "stopped"), rounds=1))
    assert isinstance(last, Finished)
    assert last.result is not None
    assert last.result["failed"] == {"0.0": "It was cancelled."}


def test_a_job_that_is_being_stopped_gathers_what_is_there(digits: DatasetFacts, tmp_path: Path) -> None:
    given = order(digits, tmp_path, ended("0.0", "stopped"), ended("0.1", "cancelled"))
    _, last = sets.carry_out(given.model_copy(update={"stopping": True}))
    assert isinstance(last, Finished)
    assert (last.outcome, last.children, last.metrics) == ("stopped", (), {"tree/children": 2})
    for nothing in ((), (ended("0.0", "cancelled"),)):
        _, last = sets.carry_out(order(digits, tmp_path, *nothing).model_copy(update={"stopping": True}))
        assert isinstance(last, Finished)
        assert (last.outcome, last.result) == ("cancelled", None)


def test_too_many_jobs_are_refused(digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestration, "MAX_CHILDREN", 1)
    _, last = sets.carry_out(order(digits, tmp_path))
    assert isinstance(last, Failed)
    assert "2 jobs; 1" in last.error.message


@pytest.mark.parametrize("key", ["", "a/b", "../a", None, "ä", "x" * 101])
def test_a_key_is_a_plain_name(key: Any, digits: DatasetFacts, tmp_path: Path) -> None:
    _, last = sets.carry_out(order(digits, tmp_path, wrong={"child_key": key}))
    assert isinstance(last, Failed)
    assert last.error.code == "crash"


def test_with_no_server_the_children_run_in_turn_and_start_from_each_other(
    digits: DatasetFacts, tmp_path: Path
) -> None:
    given, heard = order(digits, tmp_path), sets.Heard()
    assert alone.carry_out(given, heard.reporter, process.carry_out) == 0
    last = heard.messages[-1]
    assert isinstance(last, Finished)
    assert last.result is not None
    assert set(last.result["accuracies"]) == {"0.0", "0.1", "1.0", "1.1"}
    assert all(0 <= value <= 1 for value in last.result["accuracies"].values())
    kept = Path(given.scratch) / alone.CHILDREN
    for key in last.result["accuracies"]:
        assert {path.name for path in (kept / key).iterdir()} >= {"model.safetensors", "config.json", "README.md"}
    assert "| started from | model mdl" in (kept / "1.0" / "README.md").read_text()
    fractions = [message.fraction for message in heard.of(Progress) if message.phase.startswith("1.")]
    assert fractions == sorted(fractions)
    assert 0.5 <= fractions[0] < fractions[-1] == 1, "the second of two rounds"
    assert any(event.message.startswith("1.1: ") for event in heard.of(Event))
    assert not [path for path in Path(given.scratch).iterdir() if path.name == "running"]


def test_with_no_server_a_wrong_child_is_refused_as_the_api_would(digits: DatasetFacts, tmp_path: Path) -> None:
    given, heard = order(digits, tmp_path, wrong={"params": {"trainabel": "all"}}), sets.Heard()
    assert alone.carry_out(given, heard.reporter, process.carry_out) == 1
    last = heard.messages[-1]
    assert isinstance(last, Failed)
    assert "Child '0.0': params.trainabel" in last.error.message
    assert "did you mean trainable" in last.error.message


def test_with_no_server_a_child_that_fails_is_told_of(digits: DatasetFacts, tmp_path: Path) -> None:
    given, heard = (
        order(digits, tmp_path, rounds=1, wrong={"training": {"learning_rate": 1e30, "steps": 9}}),
        sets.Heard(),
    )
    alone.carry_out(given, heard.reporter, process.carry_out)
    last = heard.messages[-1]
    assert isinstance(last, Finished)
    assert last.result is not None
    assert "not finite" in last.result["failed"]["0.0"]


def test_with_no_server_a_cancel_ends_it(digits: DatasetFacts, tmp_path: Path) -> None:
    heard = sets.Heard(lambda message: "cancel" if isinstance(message, Progress) and ": " in message.phase else None)
    assert alone.carry_out(order(digits, tmp_path), heard.reporter, process.carry_out) == 0
    last = heard.messages[-1]
    assert isinstance(last, Finished)
    assert last.outcome == "cancelled"


def test_the_command_runs_it_and_keeps_what_the_children_made(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"recipe": "tree", "params": {"rounds": 1}}))
    out = tmp_path / "out"
    arguments = __main__.arguments(
        ["run", str(spec), "--data", "builtin:digits", "--out", str(out), "--threads", "1", "--device", "cpu"]
    )
    assert local.run(arguments) == 0
    assert (out / "tree.txt").read_text() == "0.0 0.1"
    assert json.loads((out / "result.json").read_text())["outcome"] == "succeeded"
    assert (out / "children" / "0.1" / "model.safetensors").is_file()
    assert not (out / ".work").exists()


def test_what_is_published_says_that_it_plans() -> None:
    assert catalogue.row(TREE)["requires"]["plans"] is True
    assert catalogue.row(catalogue.recipe("image_classification"))["requires"]["plans"] is False


def test_a_child_that_needs_what_is_not_there_is_named(digits: DatasetFacts) -> None:
    body = {"recipe": "image_classification", "model": sets.NETWORK}
    unlabelled = digits.model_copy(update={"labelled": {"train": 0}})
    with pytest.raises(UserFault, match="Child 'x': dataset: image_classification needs labels"):
        alone.check(body, unlabelled, child="x")
    assert alone.check(body, digits, child="x").training.epochs == 10
    assert replace(TREE, name="other").plan is plan
