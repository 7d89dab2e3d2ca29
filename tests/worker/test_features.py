"""The cache of what a frozen prefix gives."""

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Generator, Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import ResourceFault
from tests.worker import sets
from worker import ticker
from worker.data import features, rows
from worker.data.features import Features, cache_prefix
from worker.data.shelf import Shelf
from worker.parts import machine
from worker.recipe import Batch
from worker.report import Event, Planned, Progress, Reporter
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker


@pytest.fixture
def made(digits: DatasetFacts, tmp_path: Path) -> Assembly:
    body = sets.spec(params={"trainable": "last:1", "augmentation": "light"})
    return assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)


def cached(made: Assembly, folder: Path, budget: int = 10**9, **given: Any) -> Features:
    options: dict[str, Any] = {
        "views": 1, "seed": 0, "augmented": False, "key": ("k",), "plan": made.plan, "reporter": sets.Heard().reporter,
        **given,
    }  # fmt: skip
    return cache_prefix(
        made.data.train, made.data, features.identify(prefix_of(made), options["plan"], made.device),
        device=made.device, shelf=Shelf(folder, budget), **options,
    )  # fmt: skip


def prefix_of(made: Assembly) -> nn.Module:
    prefix = made.objective.frozen_prefix
    assert isinstance(prefix, nn.Module)
    return prefix


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_row_is_what_the_prefix_gives_to_the_nearest_bfloat16(
    precision: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    body = sets.spec(params={"trainable": "last:1", "augmentation": "light"}, training={"precision": precision})
    made = assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)
    found = cached(made, tmp_path / "f")
    rows = torch.tensor([3, 100, 0])
    prefix = prefix_of(made)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        expected = prefix.eval()(made.data.ready(made.data.train.batch(rows), made.device)["image"])
    batch = found.batch(rows)
    torch.testing.assert_close(batch["prefix"], expected.float(), atol=0.02, rtol=0.02)
    assert torch.equal(batch["label"], made.data.train.labels[rows])
    assert len(found) == len(made.data.train)


def test_a_network_that_autocast_computes_low_throughout_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = sets.spec(
        model={"architecture": "resnet18", "image_size": 32}, params={"trainable": "head", "augmentation": "none"},
        training={"precision": "bfloat16", "batch_size": 16, "epochs": 1},
    )  # fmt: skip
    facts = sets.write_set(tmp_path / "set", sets.digits(30, 10))
    made = assemble(sets.order(body, facts, tmp_path), sets.Heard().reporter)
    seen: set[torch.dtype] = set()
    convolve = torch.nn.Conv2d._conv_forward

    def watched(layer: nn.Conv2d, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.add(weight.dtype)
        return convolve(layer, image, weight, bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", watched)
    before = cached(made, tmp_path / "once")
    # In float32 it runs once to be compared with its folded copy, and once for the shape of what it gives.
    assert torch.bfloat16 in seen
    monkeypatch.setattr(features, "is_plain", lambda _: False)
    seen.clear()
    cast_in_every_pass = cached(made, tmp_path / "always")
    assert seen == {torch.float32}
    torch.testing.assert_close(before.values, cast_in_every_pass.values, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("trainable", ["head", "last:1"])
def test_a_frozen_network_whose_last_maps_are_products_trains_from_its_cache(
    trainable: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    body = sets.spec(
        model={"architecture": "resnet18", "image_size": 32}, params={"trainable": trainable, "augmentation": "none"},
        training={"batch_size": 64, "steps": 3},
    )  # fmt: skip
    heard, _ = sets.finished(sets.order(body, digits, tmp_path))
    assert heard.of(Planned)[0].plan["small_map_products"]
    assert "features.cached" in heard.codes()


def test_every_view_of_a_row_is_what_the_prefix_gives_of_that_view(made: Assembly, tmp_path: Path) -> None:
    """An augmentation that can be repeated: each view is a little brighter, and a row is known by its picture."""

    def brighter(batch: Batch, _: Generator) -> Batch:
        shifted = batch["image"].clamp(max=200) + 20 * batch["epoch"][:, None, None, None].to(torch.uint8)
        return {**batch, "image": shifted}

    made = replace(made, data=replace(made.data, prepare=brighter))
    found = cached(made, tmp_path / "f", views=3, augmented=True)
    prefix, rows = prefix_of(made).eval(), torch.randperm(len(made.data.train))[:40]
    for epoch in range(4):
        views = (rows + epoch) % 3
        pixels = made.data.train.batch(rows)["image"].clamp(max=200).float() + 20 * views[:, None, None, None]
        images = (pixels / 255 - made.data.mean.view(-1, 1, 1)) / made.data.std.view(-1, 1, 1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=made.plan.precision == "bfloat16"):
            expected = prefix(images)
        torch.testing.assert_close(found.batch(rows, epoch)["prefix"], expected.float(), atol=0.03, rtol=0.03)


def test_views_take_turns_from_epoch_to_epoch(made: Assembly, tmp_path: Path) -> None:
    found = cached(made, tmp_path / "f", views=3, augmented=True)
    rows = torch.tensor([5, 6])
    views = [found.batch(rows, epoch)["prefix"] for epoch in range(6)]
    for epoch in range(3):
        assert torch.equal(views[epoch], views[epoch + 3])
        assert not torch.equal(views[epoch], views[(epoch + 1) % 3])
        for place, row in enumerate(rows.tolist()):
            assert torch.equal(views[epoch][place], found.values[(row + epoch) % 3, row].float())


def test_the_key_tells_apart_what_differs(made: Assembly, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {}, {}, {"key": ("other",)}, {"views": 2, "augmented": True}, {"views": 2, "augmented": True, "seed": 1},
    ]  # fmt: skip
    for given in variants:
        cached(made, tmp_path / "f", **given)
    assert len(list((tmp_path / "f").glob("[!.]*"))) == 4


OTHERWISE: dict[str, Any] = {
    "threads": 2, "memory_format": "contiguous", "small_map_products": False, "precision": "float32",
    "float32_matmul": "highest", "deterministic": True, "mean": (0.25,),
}  # fmt: skip


@pytest.mark.parametrize("differs", [*OTHERWISE, "batch size", "torch", "processor", "layers"])
def test_features_are_found_again_only_where_they_would_be_the_same_to_the_bit(
    differs: str, made: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"precision": "bfloat16", "memory_format": "channels_last", "float32_matmul": "medium"}
    plan = made.plan.model_copy(update={**common, "small_map_products": True, "deterministic": False})
    assert not cached(made, tmp_path / "f", plan=plan).found
    assert cached(made, tmp_path / "f", plan=plan).found
    match differs:
        case "batch size":
            monkeypatch.setattr(features, "batch_size", lambda _: 16)
        case "torch" | "processor":
            there = {**machine.fingerprint("cpu"), differs: "another"}
            monkeypatch.setattr(machine, "fingerprint", lambda _: there)
        case "layers":
            stages = list(prefix_of(made).children())  # the same weights, by the same names
            monkeypatch.setattr(type(made.objective), "frozen_prefix", nn.Sequential(*stages, nn.ReLU()))
        case _:
            plan = plan.model_copy(update={differs: OTHERWISE[differs]})
    assert not cached(made, tmp_path / "f", plan=plan).found


def test_what_was_cut_short_is_computed_anew(made: Assembly, tmp_path: Path) -> None:
    before = cached(made, tmp_path).values.clone()
    (values,) = tmp_path.glob("features-*/values")
    os.truncate(values, values.stat().st_size - 1)
    again = cached(made, tmp_path)
    assert not again.found
    assert torch.equal(again.values, before)
    assert cached(made, tmp_path).found


def test_a_run_that_waits_for_anothers_features_gives_signs_of_life(
    made: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(made, tmp_path)
    (entry,) = tmp_path.glob("features-*")
    shutil.rmtree(entry)
    monkeypatch.setattr(ticker, "SECONDS", 0.0)
    told: list[Progress] = []
    with (tmp_path / f".{entry.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as one that is just computing them

        def hear(message: Any) -> None:
            told.append(message)
            if len(told) == 2:
                fcntl.flock(lock, fcntl.LOCK_UN)

        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(cached, made, tmp_path, reporter=Reporter(listener=hear))
            done, _ = wait([waits], timeout=20)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert done, "it waits without a word"
    assert [(message.phase, message.step) for message in told[:2]] == [("features", 1), ("features", 2)]


@pytest.mark.parametrize(
    ("trainable", "params", "views", "says"),
    [
        ("head", {}, 1, "run once over each sample"),
        ("head", {"augmentation": "light"}, 4, "run 4 times over each sample"),
        ("last:1", {"mixup": 0.2}, 0, "mixup and cutmix make new inputs in every step"),
        ("gradual", {}, 0, "which layers stand still changes"),
        ("all", {}, 0, None),
    ],
)
def test_the_plan_says_how_often_frozen_layers_run_and_why(
    trainable: str, params: dict[str, Any], views: int, says: str | None, digits: DatasetFacts, tmp_path: Path
) -> None:
    body = sets.spec(params={"trainable": trainable, **params}, training={"epochs": 10})
    plan = assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter).plan
    assert plan.prefix_views == views
    assert (says or "") in plan.reasons.get("prefix_views", "")
    assert ("prefix_views" in plan.reasons) == (says is not None)
    few = sets.spec(params={"trainable": "head", "augmentation": "light"}, training={"epochs": 8})
    plan = assemble(sets.order(few, digits, tmp_path), sets.Heard().reporter).plan
    assert plan.prefix_views == 0
    assert "only 8 epochs" in plan.reasons["prefix_views"]


def test_each_process_of_a_run_holds_its_part_of_the_memory(
    made: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = cached(made, tmp_path).values.nbytes + 8
    monkeypatch.setattr(machine, "memory_bytes", lambda: needed * rows.MEMORY_PART)
    assert not cached(made, tmp_path / "none", budget=0).found
    with pytest.raises(ResourceFault, match="are to be kept on disk"):
        cached(made, tmp_path / "none", budget=0, plan=made.plan.model_copy(update={"world_size": 2}))


def test_the_event_says_what_the_cache_cost_and_what_it_saves(digits: DatasetFacts, tmp_path: Path) -> None:
    heard, _ = sets.finished(sets.frozen(tmp_path, digits))
    (made,) = [event for event in heard.of(Event) if event.code == "features.cached"]
    heard, _ = sets.finished(sets.frozen(tmp_path, digits))
    (found,) = [event for event in heard.of(Event) if event.code == "features.cached"]
    assert (made.data["views"], made.data["found"], found.data["found"]) == (4, False, True)
    assert made.data["seconds_spent"] > 0
    assert found.data["seconds_spent"] == 0
    assert found.data["seconds_saved"] > made.data["seconds_saved"] > 0
    assert ("computed in" in made.message, "found, computed before" in found.message) == (True, True)
    assert "5 of the 9 passes that are still to come are saved" in made.message
    assert "9 of the 9 passes that are still to come are saved" in found.message


def test_what_is_saved_is_what_a_pass_took_times_the_passes_that_are_not_made() -> None:
    def one(views: int, seconds: float, *, found: bool) -> Features:
        labelled = cast(Any, SimpleNamespace(labels=torch.zeros(5)))
        return Features(torch.zeros(views, 5, 2), labelled, seconds, found=found)

    heard = sets.Heard()
    features.tell(one(4, 8.0, found=False), one(1, 0.5, found=False), 10, heard.reporter)
    features.tell(one(4, 8.0, found=True), None, 10, heard.reporter)
    features.tell(one(1, 8.0, found=False), None, 1, heard.reporter)
    features.tell(one(4, 8.0, found=False), one(1, 0.5, found=True), 1, heard.reporter)
    told = [(event.data["seconds_spent"], event.data["seconds_saved"]) for event in heard.of(Event)]
    assert told == [(8.5, 6 * 2.0 + 9 * 0.5), (0.0, 20.0), (8.0, 0.0), (8.0, 0.5)]
    assert "that took 3 passes more than the 1 still to come" in heard.of(Event)[-1].message


def test_a_digest_follows_the_weights() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert features.digest(one) == features.digest(other)
    with torch.no_grad():
        other.weight[0, 0] += 1e-7 + other.weight[0, 0].abs() * 1e-6
    assert features.digest(one) != features.digest(other)


@pytest.mark.parametrize("augmented", [False, True])
def test_where_memory_runs_out_the_prefix_runs_over_fewer_samples_at_once(
    augmented: bool, made: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cached(made, tmp_path / "whole", augmented=augmented)
    real, sizes = features.folded, list[int]()

    def limited(*given: Any) -> nn.Module:
        def look(module: nn.Module, images: tuple[torch.Tensor]) -> None:
            if len(images[0]) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            sizes.append(len(images[0]))

        runs = real(*given)
        runs.register_forward_pre_hook(look)
        return runs

    monkeypatch.setattr(features, "folded", limited)
    found = cached(made, tmp_path / "pieces", augmented=augmented)
    assert max(sizes) == 4
    torch.testing.assert_close(found.values, expected.values, atol=0.02, rtol=0.02)


def test_a_row_has_the_number_of_its_sample(made: Assembly, tmp_path: Path) -> None:
    found = cached(made, tmp_path / "f")
    rows = torch.tensor([3, 100, 0])
    numbers = found.batch(rows)["index"]
    assert torch.equal(numbers, made.data.train.batch(rows)["index"])
    assert torch.equal(found.numbers(rows), numbers)
    assert not torch.equal(numbers, rows), "some of the split validates"
