"""Killed at a random step and resumed, a run ends with the bits of one that was not: many ways to train, one promise.

Most combinations are part of `make test-long`; test_every_recipe.py asks the same of every recipe on every run.
"""

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.domain.datasets import DatasetFacts
from app.domain.spec import Training
from tests.worker import sets
from tests.worker.objectives import plan
from worker import sources
from worker.parts import machine
from worker.report import Event, Finished, Order, Planned, Saved, read_report
from worker.trainer.announce import announce

pytestmark = pytest.mark.worker

STOPPING = {"early_stopping": {"metric": "validation/loss", "patience": 2, "min_delta": 0.02}}
# name: optimiser, precision, the rest of `training`, the recipe's `params`
COMBINATIONS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "plain sgd": ("sgd", "float32", {}, {"augmentation": "none"}),
    "plain adam": ("adam", "float32", {"schedule": "constant"}, {"augmentation": "none"}),
    "plain adamw": ("adamw", "float32", {"schedule": "linear"}, {"augmentation": "none"}),
    "plain muon": ("muon", "float32", {"schedule": "triangular"}, {"augmentation": "none"}),
    "sgd, bf16, light": ("sgd", "bfloat16", {"schedule": "step"}, {"augmentation": "light"}),
    "adam, bf16, light": ("adam", "bfloat16", {"warmup_fraction": 0.5}, {"augmentation": "light"}),
    "adamw, bf16, standard": ("adamw", "bfloat16", {}, {"augmentation": "standard"}),
    "muon, bf16, strong": ("muon", "bfloat16", {}, {"augmentation": "strong"}),
    "sgd, average, strong": ("sgd", "float32", {}, {"augmentation": "strong", "ema": 0.9}),
    "adam, average, clipped": ("adam", "float32", {"gradient_clip": 0.5}, {"augmentation": "light", "ema": 0.99}),
    "adamw, bf16, average": ("adamw", "bfloat16", {"schedule": "triangular"}, {"ema": 0.8}),
    "muon, bf16, average": ("muon", "bfloat16", {"schedule": "step"}, {"augmentation": "standard", "ema": 0.95}),
    "mixup": ("adamw", "float32", {}, {"mixup": 0.4, "label_smoothing": 0.1}),
    "cutmix": ("sgd", "bfloat16", {}, {"cutmix": 1.0, "augmentation": "light"}),
    "mixup and cutmix": ("muon", "float32", {}, {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9}),
    "accumulated": ("adamw", "bfloat16", {"accumulate": 4}, {"head": {"hidden": 16, "dropout": 0.3}}),
    "accumulated sgd": ("sgd", "float32", {"accumulate": 2, "gradient_clip": 1.0}, {"augmentation": "strong"}),
    "head": ("adamw", "float32", {}, {"trainable": "head"}),
    "head, cached views": ("sgd", "bfloat16", {"epochs": 9}, {"trainable": "head", "augmentation": "standard"}),
    "head, cached views, average": (
        "muon", "float32", {"epochs": 9},
        {"trainable": "head", "augmentation": "light", "ema": 0.9, "head": {"hidden": 16, "dropout": 0.2}},
    ),
    "last stage": ("adam", "bfloat16", {}, {"trainable": "last:1"}),
    "last stage, cached views": ("adamw", "float32", {"epochs": 9}, {"trainable": "last:1", "augmentation": "strong"}),
    "last stage, mixed": ("muon", "bfloat16", {}, {"trainable": "last:1", "mixup": 0.5}),
    "gradual": ("adamw", "float32", {"epochs": 4}, {"trainable": "gradual", "layer_decay": 0.7}),
    "gradual, average": ("sgd", "bfloat16", {"epochs": 4}, {"trainable": "gradual", "ema": 0.9}),
    "gradual muon": ("muon", "float32", {"epochs": 4}, {"trainable": "gradual", "augmentation": "standard"}),
    "stopped early": ("adamw", "float32", {"epochs": 12, "learning_rate": 0.03, **STOPPING}, {}),
    "stopped early, average": ("muon", "bfloat16", {"epochs": 12, "learning_rate": 0.03, **STOPPING}, {"ema": 0.7}),
    "weighted classes": ("adam", "float32", {}, {"class_balance": "weighted", "augmentation": "standard"}),
    "resampled classes": ("sgd", "float32", {"schedule": "constant"}, {"class_balance": "resample"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> DatasetFacts:
    """Digits at 16 pixels in three shades, so that colours can be changed and stages halve the image."""
    shades = np.array([1.0, 0.8, 0.5])
    made = {
        split: ((pixels.repeat(2, 1).repeat(2, 2)[..., None] * shades).astype(np.uint8), labels)
        for split, (pixels, labels) in sets.digits(120, 40).items()
    }
    return sets.write_set(tmp_path_factory.mktemp("coloured"), made)


def job(name: str) -> dict[str, Any]:
    optimizer, precision, training, params = COMBINATIONS[name]
    given = {"optimizer": optimizer, "precision": precision, "checkpoint_every": 1, "epochs": 2, "seed": 3, **training}
    return sets.spec(training=given, params=params)


# What holds most kinds of state is asked on every run of the tests, the rest by `make test-long`.
OFTEN = ("gradual, average", "head, cached views, average", "stopped early, average")
MARKED = [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.long]) for name in COMBINATIONS]


@pytest.mark.parametrize("name", MARKED)
def test_killed_at_a_random_step_and_resumed(name: str, coloured: DatasetFacts, tmp_path: Path) -> None:
    whole = sets.order(job(name), coloured, tmp_path / "whole")
    heard, last = sets.finished(whole)
    if "cached" in name:
        assert heard.of(Planned)[0].plan["prefix_views"] > 1
    if "stopped" in name:
        assert last.result is not None
        assert last.result["ended_by"] == "early_stopping"
    steps = heard.of(Saved)[-1].step
    for cut in random.Random(name).sample(range(1, steps), 2):
        # The resumed run makes its own caches, as on another host.
        path = sets.killed_at(cut, sets.order(job(name), coloured, tmp_path / f"cut-{cut}"))
        resumed = sets.order(job(name), coloured, tmp_path / f"resumed-{cut}", checkpoint=path)
        again, ended = sets.finished(resumed)
        assert sets.weights_sha256(resumed) == sets.weights_sha256(whole), f"after step {cut} of {steps}"
        assert again.metrics() == [row for row in heard.metrics() if row[1] > cut]
        assert (ended.metrics, ended.best) == (last.metrics, last.best)


PROCESS = """
import sys
from worker.trainer import process
from worker.report import Order, Reporter
order = Order.model_validate_json(sys.stdin.read())
raise SystemExit(process.carry_out(order, Reporter(listener=lambda m: print(m.model_dump_json(), flush=True))))
"""


def in_a_process(order: Order, *, kill_after: int | None = None) -> list[Any]:
    """Carry out an order in a new process; with `kill_after`, kill -9 it once that many checkpoints are written."""
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order.model_dump_json())
        process.stdin.close()
        heard: list[Any] = []
        for line in process.stdout:
            heard.append(read_report.validate_json(line))
            if kill_after is not None and sum(isinstance(each, Saved) for each in heard) == kill_after:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    if kill_after is not None:
        assert process.returncode == -signal.SIGKILL
    return heard


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["muon, bf16, strong", "head, cached views", "gradual, average"])
def test_killed_for_real_and_resumed_in_another_process(
    name: str, threads: int, coloured: DatasetFacts, tmp_path: Path
) -> None:
    whole = sets.order(job(name), coloured, tmp_path / "whole", threads=threads)
    ended = in_a_process(whole)[-1]
    assert isinstance(ended, Finished), ended
    cut = sets.order(job(name), coloured, tmp_path / "cut", threads=threads)
    heard = in_a_process(cut, kill_after=3)
    assert next(each for each in heard if isinstance(each, Planned)).plan["threads"] == threads
    newest = sorted(Path(cut.scratch).glob("checkpoint-*.safetensors"))[-1]
    resumed = sets.order(job(name), coloured, tmp_path / "resumed", checkpoint=str(newest), threads=threads)
    again = in_a_process(resumed)[-1]
    assert isinstance(again, Finished), again
    assert sets.weights_sha256(resumed) == sets.weights_sha256(whole)
    assert (again.metrics, again.best) == (ended.metrics, ended.best)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["image_classification", "deepcluster"])
def test_compiled_it_ends_with_the_same_bits_whichever_batch_comes_first(
    recipe: str, coloured: DatasetFacts, tmp_path: Path
) -> None:
    """deepcluster begins with all images in large batches; resumed within an epoch it begins with a step."""
    body = sets.spec(recipe, training={"compile": True, "checkpoint_every": 1, "epochs": 2, "precision": "float32"})
    whole = sets.order(body, coloured, tmp_path / "whole")
    heard = in_a_process(whole)
    ended = heard[-1]
    assert isinstance(ended, Finished), ended
    assert next(each for each in heard if isinstance(each, Planned)).plan["compile"] is True
    cut = sets.order(body, coloured, tmp_path / "cut")
    in_a_process(cut, kill_after=3)
    newest = sorted(Path(cut.scratch).glob("checkpoint-*.safetensors"))[-1]
    resumed = sets.order(body, coloured, tmp_path / "resumed", checkpoint=str(newest))
    again = in_a_process(resumed)
    assert next(each for each in again if isinstance(each, Planned)).exact is True
    assert sets.weights_sha256(resumed) == sets.weights_sha256(whole)


@pytest.mark.parametrize("streamed_first", [True, False])
def test_going_on_with_or_without_room_for_decoded_images_changes_no_bit(streamed_first: bool, tmp_path: Path) -> None:
    """A stream knows mean and deviation from a part of the images, so those of the plan have to count."""
    draws = np.random.default_rng(0)
    pixels = (draws.random((4200, 8, 8)) * draws.integers(1, 256, (4200, 1, 1))).astype(np.uint8)
    facts = sets.write_set(tmp_path / "set", {"train": (pixels, np.arange(4200) % 10)}, rows_per_shard=2100)
    spec = sets.spec(training={"steps": 6, "checkpoint_every": 1, "batch_size": 16})
    first, then = (0, 10**9) if streamed_first else (10**9, 0)
    whole = sets.order(spec, facts, tmp_path / "whole", cache_bytes=first)
    heard, _ = sets.finished(whole)
    assert ("data.streaming" in heard.codes()) == streamed_first
    path = sets.killed_at(3, sets.order(spec, facts, tmp_path / "cut", cache_bytes=first))
    resumed = sets.order(spec, facts, tmp_path / "resumed", checkpoint=path, cache_bytes=then)
    again, _ = sets.finished(resumed)
    assert ("data.streaming" in again.codes()) != streamed_first
    assert again.of(Planned)[0].exact is True
    assert sets.weights_sha256(resumed) == sets.weights_sha256(whole)


@pytest.fixture(scope="module")
def paused(coloured: DatasetFacts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Order, Planned, str]:
    """Give a run that was paused after its fourth step: its order, its plan, its checkpoint."""
    order = sets.order(sets.spec(training={"checkpoint_every": 4}), coloured, tmp_path_factory.mktemp("paused"))
    heard, _ = sets.carry_out(order, lambda message: "pause" if isinstance(message, Saved) else None)
    return order, heard.of(Planned)[0], str(Path(order.scratch) / heard.of(Saved)[0].file)


@pytest.mark.parametrize("differs", [*sorted(machine.provenance("cpu")), "a new entry", "an entry of old", "device"])
def test_elsewhere_it_goes_on_and_says_that_it_is_not_exact(
    differs: str, paused: tuple[Order, Planned, str], coloured: DatasetFacts, tmp_path: Path
) -> None:
    first, planned, checkpoint = paused
    fingerprint, changes = dict(planned.fingerprint), dict[str, Any]()
    match differs:
        case "a new entry":
            fingerprint.pop("engine")  # as in what was begun before the engine was in it
            differs = "engine"
        case "an entry of old":
            fingerprint["libc"] = "2.17"
            differs = "libc"
        case "device":
            changes["device"] = "cuda"
        case _:
            fingerprint[differs] = "another"
    # What the checkpoint says counts: a job that goes on from another job's has no attempt of its own to ask.
    checkpoint = as_if_begun(checkpoint, tmp_path, fingerprint=fingerprint, **changes)
    order = sets.order(first.spec, coloured, tmp_path, plan=planned.plan, attempt=1, checkpoint=checkpoint)
    heard, _ = sets.finished(order)
    assert heard.of(Planned)[0].exact is False
    (event,) = [event for event in heard.of(Event) if event.code == "resume.inexact"]
    assert event.data["differs"] == [differs]


@pytest.mark.parametrize(("deterministic", "differs"), [(True, []), (False, ["kernels"])])
def test_on_a_gpu_only_a_deterministic_run_goes_on_to_the_same_bits(
    deterministic: bool, differs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "provenance", lambda _: {"gpu": "one"})
    begun = plan(Training(), device="cuda", deterministic=deterministic, fingerprint={"gpu": "one"})
    heard = sets.Heard()
    announce(begun, torch.device("cuda"), heard.reporter, first=begun)
    announce(begun, torch.device("cuda"), heard.reporter)
    assert [said.exact for said in heard.of(Planned)] == [deterministic, True]
    assert [event.data["differs"] for event in heard.of(Event)] == ([differs] if differs else [])


def test_after_an_update_of_our_own_code_it_is_not_exact_but_finds_what_is_kept(
    paused: tuple[Order, Planned, str], coloured: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, planned, checkpoint = paused
    shelf = Path(first.cache) / "shelf"
    decoded = {path.name for path in shelf.glob("images-*")}
    monkeypatch.setattr(sources, "digest", lambda: "another")
    order = sets.order(
        first.spec, coloured, tmp_path, plan=planned.plan, attempt=2, checkpoint=checkpoint, cache=first.cache
    )  # fmt: skip
    heard, _ = sets.finished(order)
    assert (heard.of(Planned)[0].exact, heard.of(Planned)[0].fingerprint["engine"]) == (False, "another")
    (event,) = [event for event in heard.of(Event) if event.code == "resume.inexact"]
    assert event.data["differs"] == ["engine"]
    assert decoded
    assert {path.name for path in shelf.glob("images-*")} == decoded


def test_what_the_plan_asks_of_a_machine_that_cannot_do_it_is_done_otherwise_and_said(
    paused: tuple[Order, Planned, str], coloured: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begins on a GPU in float16, or compiled where there is a compiler, and goes on where there is neither."""
    first, planned, checkpoint = paused
    begun = {"compile": True, "precision": "float16"}
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    order = sets.order(
        first.spec, coloured, tmp_path, plan={**planned.plan, **begun}, attempt=2,
        checkpoint=as_if_begun(checkpoint, tmp_path, **begun),
    )  # fmt: skip
    heard, _ = sets.finished(order)
    (said,) = heard.of(Planned)
    assert (said.exact, said.plan["compile"], said.plan["precision"]) == (False, False, planned.plan["precision"])
    assert "no C++ compiler" in said.plan["reasons"]["compile"]
    (event,) = [event for event in heard.of(Event) if event.code == "resume.inexact"]
    assert event.data["differs"] == ["compile", "precision"]


def as_if_begun(path: str, folder: Path, **changes: Any) -> str:
    """Rewrite a checkpoint as if its run had begun under a plan with these changes."""
    from worker import checkpoint

    found = checkpoint.read(Path(path))
    state = {**found.state, "plan": {**found.state["plan"], **changes}}
    checkpoint.write(folder / "elsewhere.safetensors", checkpoint.Contents(found.tensors, state))
    return str(folder / "elsewhere.safetensors")


def test_the_plan_of_the_first_attempt_decides_the_threads(
    paused: tuple[Order, Planned, str], coloured: DatasetFacts, tmp_path: Path
) -> None:
    """One thread and two give other bits, so a worker with more of them uses as many as the plan says: still exact."""
    first, planned, checkpoint = paused
    order = sets.order(
        first.spec, coloured, tmp_path / "more", plan=planned.plan, attempt=2, checkpoint=checkpoint, threads=2
    )
    heard, _ = sets.finished(order)
    assert (heard.of(Planned)[0].exact, heard.of(Planned)[0].plan["threads"]) == (True, 1)
    assert "resume.inexact" not in heard.codes()
    whole = sets.order(first.spec, coloured, tmp_path / "whole")
    sets.carry_out(whole)
    assert sets.weights_sha256(order) == sets.weights_sha256(whole)
