"""Whole orders: from a spec and shards to a model, what a resumed attempt keeps, and how each failure is classed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.domain.datasets import DatasetFacts
from app.domain.models import ModelConfig
from tests.worker import sets
from worker.finetune import image_classification
from worker.loop import Result
from worker.parts import machine
from worker.parts.networks import load_network
from worker.report import BaseModelInput, Event, Finished, Metrics, Planned, Saved
from worker.trainer import __main__, assembly, local, process, training

pytestmark = pytest.mark.worker


def base_of(order: Any, last: Finished) -> BaseModelInput:
    assert last.model is not None
    return BaseModelInput(
        id="mdl_base", config=last.model.config, weights=str(Path(order.scratch) / "model" / "model.safetensors")
    )


def test_test_figures_are_those_of_float32_that_no_gpu_has_rounded(digits: DatasetFacts, tmp_path: Path) -> None:
    order, reporter = sets.order(sets.spec(), digits, tmp_path), sets.Heard().reporter
    made, seen = assembly.assemble(order, reporter), list[str]()
    objective: Any = made.objective
    evaluate = objective.evaluate

    def look(batch: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return evaluate(batch)

    objective.evaluate = look
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        result = Result("succeeded", "epochs", 1, 1, {}, None, 1.0, 1.0)
        as_planned = replace(made, plan=made.plan.model_copy(update={"device": "cuda"}))  # on the CPU all the same
        training._finish(as_planned, result, order, reporter)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen[:-1]) == {"high"}
    assert seen[-1] == "highest", "the one batch of the test split"


def test_what_happens_in_which_order(digits: DatasetFacts, tmp_path: Path) -> None:
    heard, last = sets.finished(sets.order(sets.spec(), digits, tmp_path))
    kinds = [message.__class__.__name__ for message in heard.messages]
    assert kinds.index("Planned") < kinds.index("Metrics") < kinds.index("Saved") < kinds.index("Finished")
    assert heard.codes()[-1] == "train.first_step"
    assert kinds.count("Planned") == kinds.count("Finished") == 1
    plan = heard.of(Planned)[0].plan
    assert (plan["image_size"], plan["channels"], plan["batch_size"], plan["threads"]) == (8, 1, 16, 1)
    assert json.loads(json.dumps(plan)) == plan
    assert last.result is not None
    assert last.result["labels"] == {"train": 140, "validation": 20}
    assert set(last.result["test"]["classes"]) == set("0123456789")
    assert {"validation/accuracy", "test/accuracy", "test/f1", "train/loss"} <= set(last.metrics)


def test_the_exported_network_has_the_reported_accuracy(digits: DatasetFacts, tmp_path: Path) -> None:
    order = sets.order(sets.spec(training={"epochs": 8, "learning_rate": 0.01}), digits, tmp_path)
    _, last = sets.finished(order)
    assert last.model is not None
    config = ModelConfig.model_validate_json((Path(order.scratch) / "model" / "config.json").read_text())
    assert config == last.model.config
    network = load_network(config, Path(order.scratch) / "model" / "model.safetensors")
    pixels, labels = sets.digits()["test"]
    x = (torch.from_numpy(pixels)[:, None] / 255 - config.mean[0]) / config.std[0]
    with torch.no_grad():
        accuracy = (network(x).argmax(1) == torch.from_numpy(labels)).float().mean().item()
    assert accuracy > 0.5
    assert last.metrics["test/accuracy"] == pytest.approx(accuracy, abs=0.017), "one image of sixty may round otherwise"


def test_pretrain_then_fine_tune_from_it(digits: DatasetFacts, tmp_path: Path) -> None:
    first = sets.order(sets.spec("simclr"), digits, tmp_path / "pre")
    _, pretrained = sets.finished(first)
    base = base_of(first, pretrained)
    assert base.config.classes == ()
    body = {**sets.spec(params={"trainable": "head"}), "model": "mdl_" + "a" * 26}
    order = sets.order(body, digits, tmp_path / "fine", model=base)
    _, last = sets.finished(order)
    assert last.model is not None
    assert (last.model.config.mean, last.model.config.std) == (base.config.mean, base.config.std)
    before, after = load_file(base.weights), load_file(Path(order.scratch) / "model" / "model.safetensors")
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the frozen backbone stands still"
    assert any(name.startswith("head.") for name in after)


@pytest.mark.parametrize("trainable", ["head", "last:2"])
def test_a_cached_frozen_prefix_gives_the_accuracy_of_an_uncached_one(
    trainable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = sets.write_set(tmp_path / "set", sets.digits(500, 200))
    first = sets.order(sets.spec("simclr", training={"epochs": 6, "batch_size": 100}), facts, tmp_path / "pre")
    base = base_of(first, sets.finished(first)[1])
    body = {**sets.spec(params={"trainable": trainable}, training={"epochs": 15, "learning_rate": 0.02}),
            "model": "mdl_" + "a" * 26}  # fmt: skip
    heard, cached = sets.finished(sets.order(body, facts, tmp_path / "cached", model=base))
    assert "features.cached" in heard.codes()
    order = sets.order(body, facts, tmp_path / "cached", model=base)
    weights = sets.weights_sha256(order)
    again, _ = sets.finished(order)
    told = next(message for message in again.of(Event) if message.code == "features.cached")
    assert told.data["found"], "the second use reads the same features"
    assert sets.weights_sha256(order) == weights
    assert again.metrics() == heard.metrics()
    monkeypatch.setattr(image_classification.Classifier, "frozen_prefix", None)
    heard, plain = sets.finished(sets.order(body, facts, tmp_path / "plain", model=base))
    assert "features.cached" not in heard.codes()
    assert cached.metrics["test/accuracy"] == pytest.approx(plain.metrics["test/accuracy"], abs=0.03)
    assert (cached.metrics["test/accuracy"] or 0) > 0.5


def test_augmented_views_of_a_frozen_prefix_are_cached_too(digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec(params={"trainable": "head", "augmentation": "light"}, training={"epochs": 10})
    heard, last = sets.finished(sets.order(body, digits, tmp_path))
    event = next(message for message in heard.of(Event) if message.code == "features.cached")
    assert event.data["views"] == 4
    assert last.outcome == "succeeded"


def test_a_budget_of_labels_includes_those_for_validation(digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec(data={"labels_per_class": 5, "validation_fraction": 0.2})
    _, last = sets.finished(sets.order(body, digits, tmp_path))
    assert last.result is not None
    assert last.result["labels"] == {"train": 40, "validation": 10}


def test_a_validation_split_is_used_unless_there_is_a_budget(tmp_path: Path) -> None:
    made = sets.digits(160, 60)
    made["validation"] = (made["train"][0][:30], made["train"][1][:30])
    facts = sets.write_set(tmp_path / "set", {name: made[name] for name in ("train", "validation", "test")})
    for data, labels in (
        ({}, {"train": 160, "validation": 30}),
        ({"label_fraction": 0.5, "validation_fraction": 0.0}, {"train": 80}),
    ):
        _, last = sets.finished(sets.order(sets.spec(data=data), facts, tmp_path / str(len(data))))
        assert last.result is not None
        assert last.result["labels"] == labels


def test_a_later_attempt_uses_the_first_ones_plan(digits: DatasetFacts, tmp_path: Path) -> None:
    first = sets.order(sets.spec(), digits, tmp_path / "one")
    heard, _ = sets.finished(first)
    planned = heard.of(Planned)[0]
    later = sets.order(
        sets.spec(), digits, tmp_path / "two", plan={**planned.plan, "memory_format": "contiguous"}, attempt=2,
        threads=2,
    )  # fmt: skip
    heard, _ = sets.finished(later)
    again = heard.of(Planned)[0]
    assert (again.plan["memory_format"], again.plan["threads"], again.exact) == ("contiguous", 1, True)
    assert torch.get_num_threads() == 1


def test_a_crash_is_a_system_fault_with_its_trace_in_the_log(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(image_classification.Classifier, "_logits", crash)
    heard, last = sets.failed(sets.order(sets.spec(), digits, tmp_path))
    assert (last.error.fault, last.error.code, last.error.retryable) == ("system", "crash", True)
    event = next(message for message in heard.of(Event) if message.code == "trainer.crashed")
    assert any("by design" in line for line in event.data["trace"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "simclr", "params": {"temperatur": 1}}, "temperatur"),
        ({"recipe": "image_classification", "params": {"trainable": "last:9"}}, "stages"),
        ({"recipe": "image_classification", "training": {"epochs": 0}}, "training/epochs"),
        ({"recipe": "image_classification", "model": None}, "model"),
        ({"recipe": "image_classification", "model": {"architecture": "resnet_18"}}, "resnet_18"),
        ({"recipe": "image_classification", "training": {"batch_size": 9, "accumulate": 2}}, "accumulate"),
    ],
)
def test_a_wrong_spec_is_a_user_fault_that_names_the_field(
    changed: dict[str, Any], message: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    order = sets.order({**sets.spec(changed["recipe"]), **changed}, digits, tmp_path)
    _, last = sets.failed(order)
    assert last.error.fault == "user", last.error
    assert message in last.error.message


def test_an_unlabelled_set_can_be_pretrained_on_but_not_classified(tmp_path: Path) -> None:
    made = sets.digits(60, 10)
    facts = sets.write_set(tmp_path / "set", {"train": (made["train"][0], made["train"][1] * 0 - 1)})
    heard, _ = sets.finished(sets.order(sets.spec("simclr"), facts, tmp_path / "pre"))
    names = {name for name, _, _ in heard.metrics()}
    assert {"probe/effective_rank", "probe/feature_spread"} <= names
    assert "probe/knn_accuracy" not in names
    _, refused = sets.failed(sets.order(sets.spec(), facts, tmp_path / "fine"))
    assert refused.error.fault == "user"
    assert "label" in refused.error.message


def test_measuring_runs_a_few_steps_and_keeps_nothing(digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec(training={"epochs": 200})
    order = sets.order(body, digits, tmp_path).model_copy(update={"recipe": "measure", "kind": "internal"})
    others = Path(order.cache) / "shelf" / "of_another_job" / "pixels"
    others.parent.mkdir(parents=True)
    with others.open("wb") as file:
        file.truncate(10**9)
    heard, last = sets.finished(order)
    found = last.result
    assert found is not None
    assert found["steps"] == 1600
    assert 0 < found["seconds_per_step"] < 5
    assert found["estimated_seconds"] == pytest.approx(found["seconds_per_step"] * 1600)
    assert found["memory_bytes"] > 50e6
    assert found["disk_bytes"] == (160 + 60) * 64 + 3 * found["checkpoint_bytes"], "no other job's images"
    assert found["parameters"] * 12 <= found["checkpoint_bytes"] <= found["parameters"] * 13 + 10_000
    assert heard.of(Saved) == heard.of(Metrics) == []
    assert last.model is None
    assert list(Path(order.scratch).glob("*.safetensors")) == []


def test_ingest_is_an_order_like_any_other(tmp_path: Path) -> None:
    order = sets.order(sets.spec(), sets.write_set(tmp_path / "s", sets.digits(20, 5)), tmp_path).model_copy(
        update={"recipe": "ingest", "kind": "internal", "spec": {"builtin": "digits"}, "dataset": None}
    )
    _, last = sets.finished(order)
    assert last.dataset is not None
    assert last.dataset.facts.splits == {"train": 1297, "test": 500}
    heard = sets.Heard()
    heard.reporter.want("drain")
    process.carry_out(order, heard.reporter)
    assert [message.outcome for message in heard.of(Finished)] == ["drained"]


def test_a_run_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    pixels, labels = sets.digits(60, 30)["train"]
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = tmp_path / "data" / ("test" if number % 3 == 0 else "train") / f"digit{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "spec.json").write_text(json.dumps(sets.spec()))
    given = ["run", str(tmp_path / "spec.json"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert local.run(__main__.arguments([*given, "--threads", "1"])) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["type"] == "finished"
    assert {"planned", "metrics", "event", "progress"} <= {line["type"] for line in lines}
    made = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert made == {"model.safetensors", "config.json", "README.md", "metrics.json", "result.json"}
    (tmp_path / "spec.json").write_text("{not json")
    assert local.run(__main__.arguments(given)) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["fault"] == "user"


def test_a_whitening_stem_is_set_from_the_data_and_stands_still(digits: DatasetFacts, tmp_path: Path) -> None:
    body = {**sets.spec(), "model": {**sets.NETWORK, "whitening": True}}
    order = sets.order(body, digits, tmp_path)
    sets.finished(order)
    stem = load_file(Path(order.scratch) / "model" / "model.safetensors")["stem.0.weight"]
    half = len(stem) // 2
    assert torch.equal(stem[:half], -stem[half:]), "every filter comes with its negative"
    plain = sets.order(sets.spec(params={"trainable": "head"}), digits, tmp_path / "plain")
    sets.finished(plain)
    random = load_file(Path(plain.scratch) / "model" / "model.safetensors")["stem.0.weight"]
    assert not torch.equal(random[:half], -random[half : 2 * half]), "a frozen stem is not a whitening one"


@pytest.mark.parametrize("params", [{}, {"trainable": "gradual"}])
def test_compiling_reaches_what_is_called(
    params: dict[str, Any], digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def compiling(function: Any, **_: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            compiled.append(function)
            return function(*given, **named)

        return call

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")  # a compiler, for the plan
    body = sets.spec(params=params, training={"compile": True, "epochs": 1})
    sets.finished(sets.order(body, digits, tmp_path))
    assert compiled
