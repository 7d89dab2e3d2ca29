"""A model looks at a dataset: the embeddings as a table, the features' cache, what ends such a job."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.domain.datasets import DatasetFacts
from tests.worker import models, sets
from worker.parts import machine
from worker.parts.networks import load_network
from worker.report import BaseModelInput, Failed, Finished, Metrics, Order, Planned
from worker.trainer import __main__, application, local

pytestmark = pytest.mark.worker


def order(facts: DatasetFacts, folder: Path, base: BaseModelInput | None, **given: Any) -> Order:
    return sets.order({"recipe": "embed", "model": models.MODEL, **given}, facts, folder, model=base)


def done(given: Order) -> tuple[sets.Heard, Finished]:
    heard, last = sets.carry_out(given)
    assert isinstance(last, Finished), last
    return heard, last


def read(given: Order) -> pa.Table:
    return pq.read_table(Path(given.scratch) / "embedding.parquet")


def matrix(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModelInput:
    return models.random(tmp_path_factory.mktemp("model"))


def test_the_table_holds_what_the_bare_network_gives(
    digits: DatasetFacts, model: BaseModelInput, tmp_path: Path
) -> None:
    given = order(digits, tmp_path, model, training={"precision": "float32"})
    heard, last = done(given)
    table = read(given)
    network = load_network(model.config, Path(model.weights))
    made = sets.digits()
    pixels = torch.from_numpy(np.concatenate([made["train"][0], made["test"][0]]))[:, None] / 255
    with torch.no_grad():
        expected = network((pixels - 0.5) / 0.3).numpy()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), expected.shape[1])
    np.testing.assert_allclose(matrix(table), expected, rtol=1e-4, atol=1e-5)
    assert table["sample"].to_pylist() == list(range(220))
    assert table["split"].to_pylist() == ["train"] * 160 + ["test"] * 60
    assert table["label"].to_pylist() == [str(n) for split in ("train", "test") for n in made[split][1]]
    assert [(file.name, file.media_type) for file in last.files] == [
        ("embedding.parquet", "application/vnd.apache.parquet")
    ]
    assert (last.outcome, last.model) == ("succeeded", None)
    assert last.result == {"samples": 220, "dimension": expected.shape[1], "explained_variance": None}
    assert set(last.metrics) == {"embedding/effective_rank", "embedding/feature_spread"}
    assert {name for name, _, _ in heard.metrics()} == set(last.metrics)
    kinds = [type(message) for message in heard.messages]
    assert kinds.count(Planned) == 1
    assert kinds.index(Planned) < kinds.index(Metrics)


def test_projection_and_length(digits: DatasetFacts, model: BaseModelInput, tmp_path: Path) -> None:
    whole = order(digits, tmp_path / "whole", model, params={"splits": ["train"]})
    done(whole)
    features = matrix(read(whole)).astype(np.float64)
    assert len(features) == 160
    small = order(digits, tmp_path / "small", model, params={"splits": ["train"], "components": 3})
    _, last = done(small)
    centred = features - features.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:3].T
    found = matrix(read(small))
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-3 * np.abs(expected).max())
    assert last.result is not None
    assert last.result["explained_variance"] == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum(), abs=1e-4)
    unit = order(digits, tmp_path / "unit", model, params={"normalise": True})
    done(unit)
    np.testing.assert_allclose(np.linalg.norm(matrix(read(unit)), axis=1), 1, atol=1e-5)


def test_features_are_computed_once_and_only_for_the_same_weights(
    digits: DatasetFacts, model: BaseModelInput, tmp_path: Path
) -> None:
    first = order(digits, tmp_path, model)
    done(first)
    kept = sorted(path.name for path in (tmp_path / "cache" / "shelf").glob("features*"))
    before = read(first)
    stamps = _stamps(tmp_path)
    done(first)
    assert read(first).equals(before)
    assert _stamps(tmp_path) == stamps, "the second job writes no features"
    other = models.random(tmp_path / "other")
    state = {name: value * 1.5 if value.is_floating_point() else value for name, value in
             load_file(other.weights).items()}  # fmt: skip
    save_file(state, other.weights)
    changed = order(digits, tmp_path, other)
    done(changed)
    assert not np.allclose(matrix(read(changed)), matrix(before))
    now = {path.name for path in (tmp_path / "cache" / "shelf").glob("features*")}
    assert now > set(kept)
    assert len(now) == 2 * len(kept) == 4


def test_features_of_another_torch_are_not_found(
    digits: DatasetFacts, model: BaseModelInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = order(digits, tmp_path, model)
    done(given)
    there = {**machine.fingerprint("cpu"), "torch": "another"}
    monkeypatch.setattr(machine, "fingerprint", lambda _: there)
    done(given)
    assert len(_stamps(tmp_path)) == 4


def test_a_later_attempt_on_a_cpu_does_not_compute_in_float16(
    digits: DatasetFacts, model: BaseModelInput, tmp_path: Path
) -> None:
    heard, _ = done(order(digits, tmp_path / "one", model))
    (planned,) = heard.of(Planned)
    begun = {**planned.plan, "precision": "float16"}  # as on a GPU without bfloat16
    heard, _ = done(order(digits, tmp_path / "two", model).model_copy(update={"plan": begun, "attempt": 2}))
    (again,) = heard.of(Planned)
    assert (again.plan["precision"], again.exact) == (planned.plan["precision"], False)


def _stamps(folder: Path) -> list[int]:
    return sorted(path.stat().st_mtime_ns for path in (folder / "cache" / "shelf").glob("features*/values"))


def test_a_cache_without_room_changes_nothing(digits: DatasetFacts, model: BaseModelInput, tmp_path: Path) -> None:
    given = order(digits, tmp_path / "one", model)
    done(given)
    cramped = order(digits, tmp_path / "two", model).model_copy(update={"cache_bytes": 0})
    heard, _ = done(cramped)
    assert "data.streaming" in heard.codes()
    assert read(cramped).equals(read(given))


def test_a_batch_that_memory_does_not_hold_goes_in_pieces(
    digits: DatasetFacts, model: BaseModelInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, scarce = (order(digits, tmp_path / name, model) for name in ("roomy", "scarce"))
    done(given)
    sizes, load = list[int](), application._load

    def limited(_: Any, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(inputs[0]))

    def loaded(*args: Any) -> Any:
        backbone, head, normal = load(*args)
        backbone.register_forward_pre_hook(limited)
        return backbone, head, normal

    monkeypatch.setattr(application, "_load", loaded)
    done(scarce)
    assert sum(sizes) == 220
    np.testing.assert_allclose(matrix(read(scarce)), matrix(read(given)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("wish", "outcome"), [("cancel", "cancelled"), ("drain", "drained"), ("pause", "paused")])
def test_another_wish_ends_it_between_two_batches(
    wish: str, outcome: str, digits: DatasetFacts, model: BaseModelInput, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[int] = []
    tick = application.Seen.tick

    def ticking(self: Any, phase: str, at: int, total: int) -> None:
        seen.append(at)
        if phase == "features of train" and at > 0:
            self.reporter.want(wish)
        tick(self, phase, at, total)

    monkeypatch.setattr(application.Seen, "tick", ticking)
    given = order(digits, tmp_path, model, training={"batch_size": 20})
    _, last = done(given)
    assert last.outcome == outcome
    assert seen == [0, 20], "nothing goes on after the wish"
    assert (last.files, last.result) == ((), None)
    assert not list((tmp_path / "cache" / "shelf").glob("*features*[!k]")), "half of the features is not kept"


def test_grey_and_colour_labelled_or_not_and_a_single_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, shape, channels in (("grey", (5, 9, 7), 3), ("colour", (5, 9, 7, 3), 1), ("one", (1, 8, 8), 1)):
        pixels = generator.integers(0, 255, shape, np.uint8)
        facts = sets.write_set(tmp_path / name, {"train": (pixels, np.full(len(pixels), -1))})
        facts = facts.model_copy(update={"task": "unlabelled_images", "classes": ()})
        given = order(facts, tmp_path / name, models.random(tmp_path / f"{name}-model", channels=channels))
        done(given)
        assert read(given)["label"].to_pylist() == [None] * len(pixels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"params": {"components": 500, "splits": ["test"]}}, "params.components: There are 60 samples"),
        ({"params": {"components": 100}}, "64 dimensions"),
        ({"params": {"splits": ["validation"]}}, "no validation split; it has train, test"),
        ({"params": {"splits": []}}, "splits: Tuple should have at least 1 item"),
        ({"model": {"architecture": "small_cnn"}}, "needs trained weights"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    given: dict[str, Any], message: str, digits: DatasetFacts, model: BaseModelInput, tmp_path: Path
) -> None:
    _, last = sets.carry_out(order(digits, tmp_path, None if "model" in given else model, **given))
    assert isinstance(last, Failed)
    assert last.error.fault == "user", last.error
    assert message in last.error.message
    assert not list((tmp_path / "cache" / "shelf").glob("features*"))


def test_without_a_server_a_model_is_a_folder(
    digits: DatasetFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for number, image in enumerate(sets.digits(12, 1)["train"][0]):
        path = tmp_path / "data" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    models.random(tmp_path / "model")
    (tmp_path / "spec.json").write_text(json.dumps({"recipe": "embed"}))
    given = ["run", str(tmp_path / "spec.json"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
             "--threads", "1", "--model"]  # fmt: skip
    assert local.run(__main__.arguments([*given, str(tmp_path / "model")])) == 0
    assert len(pq.read_table(tmp_path / "out" / "embedding.parquet")) == 12
    capsys.readouterr()
    assert local.run(__main__.arguments([*given, str(tmp_path / "nowhere")])) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "config.json" in last["error"]["message"]
