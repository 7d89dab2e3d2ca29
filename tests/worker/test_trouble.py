"""Whatever goes wrong ends a job by the right name: nothing half is published, nothing is trained on by mistake."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import ResourceFault, SystemFault
from app.domain.spec import Spec
from tests.worker import sets
from worker import checkpoint
from worker.data.encoded import Encoded
from worker.data.order import draw_order
from worker.data.source import Part
from worker.parts.memory import is_out_of_memory
from worker.report import Event, Order, Planned, Saved
from worker.trainer import assembly, devices, training

pytestmark = pytest.mark.worker


def test_a_loss_that_is_not_finite_is_the_users_and_the_last_good_checkpoint_stays(
    digits: DatasetFacts, tmp_path: Path
) -> None:
    training = {"optimizer": "sgd", "learning_rate": 1e19, "checkpoint_every": 1, "warmup_fraction": 0.0}
    order = sets.order(sets.spec(training={**training, "precision": "float32"}), digits, tmp_path)
    heard, last = sets.failed(order)
    assert (last.error.fault, last.error.code, last.error.retryable) == ("user", "loss_not_finite", False)
    saved = heard.of(Saved)
    assert f"not finite at step {saved[-1].step + 1} (learning rate 9" in last.error.message
    assert "samples " in last.error.message
    assert last.error.hint is not None
    assert "learning_rate" in last.error.hint
    newest = checkpoint.read(Path(order.scratch) / saved[-1].file)
    assert all(value.isfinite().all() for value in newest.part("model").values() if value.is_floating_point())
    assert not (Path(order.scratch) / "model").exists()


@pytest.mark.parametrize("training", [{"batch_size": 1}, {"batch_size": 4, "accumulate": 4}])
def test_batch_norm_of_one_sample_is_the_users(training: dict[str, Any], digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec(model={"architecture": "resnet18", "image_size": 32}, training={**training, "steps": 2})
    _, last = sets.failed(sets.order(body, digits, tmp_path))
    assert (last.error.fault, last.error.code, last.error.retryable) == ("user", "batch_too_small", False)
    assert "training.batch_size" in (last.error.hint or "")


def test_a_loss_over_cached_features_names_the_samples_too(digits: DatasetFacts, tmp_path: Path) -> None:
    training = {"optimizer": "sgd", "learning_rate": 1e19, "precision": "float32", "weight_decay": 1.0}
    body = sets.spec(params={"trainable": "head"}, training=training)
    heard, last = sets.failed(sets.order(body, digits, tmp_path))
    assert last.error.code == "loss_not_finite"
    assert "features.cached" in heard.codes()
    said = re.search(r"at step (\d+) .* held the samples ([\d, ]+)\.$", last.error.message)
    assert said is not None
    made = assembly.assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)
    epoch, position = divmod(int(said[1]) - 1, made.plan.steps_per_epoch)
    order = draw_order(made.objective, made.data.train.labels, made.plan, seed=made.spec.training.seed, epoch=epoch)
    places = order[position * 16 : (position + 1) * 16]
    numbers = cast(Part, made.data.train).rows[places].tolist()
    assert list(map(int, said[2].split(", "))) == numbers
    assert numbers != places.tolist(), "the samples that validate are not counted"


class Budget:
    """Count the bytes that a forward pass keeps for its backward pass, and run out of memory above some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: float = float("inf")) -> None:
        self.largest = 0
        real = assembly.assemble

        def assemble(*given: Any, **named: Any) -> Any:
            made = real(*given, **named)
            forward = made.objective.forward

            def limited(batch: Any, progress: Any) -> Any:
                kept = 0

                def keep(tensor: Tensor) -> Tensor:
                    nonlocal kept
                    kept += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
                    self.largest = max(self.largest, kept)
                    if kept > most:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    return forward(batch, progress)

            made.objective.forward = limited
            return made

        monkeypatch.setattr(training, "assemble", assemble)


PAIRS = {"training": {"batch_size": 32, "precision": "float32", "checkpoint_every": 2, "epochs": 1}}


def weights(order: Order) -> dict[str, Tensor]:
    return load_file(Path(order.scratch) / "model" / "model.safetensors")


def test_out_of_memory_with_a_coupled_loss_computes_activations_twice(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sets.order(sets.spec("simclr", **PAIRS), digits, tmp_path / "plain")
    with monkeypatch.context() as patch:
        everything = Budget(patch)
        heard, _ = sets.finished(plain)
    expected = {row[:2]: row[2] for row in heard.metrics()}

    order = sets.order(sets.spec("simclr", **PAIRS), digits, tmp_path / "less")
    with monkeypatch.context() as patch:
        Budget(patch, most=everything.largest - 1)
        heard, _ = sets.finished(order)
    assert heard.codes().count("memory.activations_recomputed") == 1
    assert "memory.micro_batch_halved" not in heard.codes()
    before, after = (message.plan for message in heard.of(Planned))
    assert {key for key in before if before[key] != after[key]} == {"checkpoint_activations", "reasons"}
    assert "did not fit" in after["reasons"]["checkpoint_activations"]
    for name, value in weights(order).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, step, value in heard.metrics():
        if name.startswith("train/"):
            assert value == pytest.approx(expected[name, step], rel=1e-4), name

    # A later attempt takes the plan from the checkpoint and does not run out of memory again.
    saved = heard.of(Saved)[0]
    later = sets.order(sets.spec("simclr", **PAIRS), digits, tmp_path / "later", plan=before, attempt=2)
    with monkeypatch.context() as patch:
        Budget(patch, most=everything.largest - 1)
        cut = sets.order(sets.spec("simclr", **PAIRS), digits, tmp_path / "cut")
        sets.carry_out(cut, lambda message: "drain" if isinstance(message, Saved) else None)
        path = Path(cut.scratch) / saved.file
        heard, _ = sets.finished(later.model_copy(update={"checkpoint": str(path)}))
    assert [message.plan["checkpoint_activations"] for message in heard.of(Planned)] == [True]
    assert sets.weights_sha256(later) == sets.weights_sha256(order)


def test_when_even_that_does_not_fit_the_fault_names_what_does(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {"training": {**PAIRS["training"], "batch_size": 16}}
    planned = sets.order(sets.spec("simclr", **half), digits, tmp_path / "half")
    with monkeypatch.context() as patch:
        Budget(patch)
        heard, _ = sets.carry_out(planned)
        plan = {**heard.of(Planned)[0].plan, "checkpoint_activations": True}
        measured = Budget(patch)
        sets.carry_out(sets.order(planned.spec, digits, tmp_path / "measured", plan=plan))
    Budget(monkeypatch, most=measured.largest)
    heard, last = sets.failed(sets.order(sets.spec("simclr", **PAIRS), digits, tmp_path))
    assert (last.error.fault, last.error.code) == ("resource", "out_of_memory")
    assert last.error.hint == "Set training.batch_size to 16."
    assert "32" in last.error.message
    assert heard.codes().count("memory.activations_recomputed") == 1


def test_a_job_that_wants_a_gpu_never_runs_on_the_cpu(digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec(resources={"device": "cuda"})
    heard, last = sets.failed(sets.order(body, digits, tmp_path))
    assert (last.error.fault, last.error.code, last.error.retryable) == ("resource", "no_such_device", False)
    assert "resources.device" in last.error.message
    assert heard.of(Planned) == []


def test_a_gpu_that_does_not_answer_is_another_workers_chance(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, last = sets.failed(sets.order(sets.spec(), digits, tmp_path, device="cuda"))
    assert (last.error.fault, last.error.code, last.error.retryable) == ("system", "device_lost", True)
    spec = Spec.model_validate(sets.spec(resources={"device": "cpu"}))
    assert devices.choose_device(spec, sets.order(sets.spec(), digits, tmp_path, device="cuda")).type == "cpu"
    with pytest.raises(ResourceFault, match="asks for a GPU"):
        devices.choose_device(
            Spec.model_validate(sets.spec(resources={"device": "cuda"})), sets.order(sets.spec(), digits, tmp_path)
        )
    with pytest.raises(SystemFault, match="cuda:1"):
        devices.choose_device(
            Spec.model_validate(sets.spec()), sets.order(sets.spec(), digits, tmp_path, device="cuda:1")
        )


@pytest.fixture
def own(tmp_path: Path) -> DatasetFacts:
    """A dataset that may be damaged: two training shards and one of the test split."""
    return sets.write_set(tmp_path / "set", sets.digits())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    path.unlink()
    path.write_bytes(path.with_name("test-00000.arrow").read_bytes())


def repaint(path: Path) -> None:
    """Change one byte of a pixel, which no decoder would notice."""
    data = path.read_bytes()
    place = data.index(b"IDAT") + 12
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([data[place] ^ 1]))


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "swapped": swap, "repainted": repaint, "gone": Path.unlink}
NAME = "train-00001.arrow"


@pytest.mark.parametrize("streamed", [False, True], ids=["decoded once", "streamed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_changed_before_it_was_read_is_named(
    damage: str, streamed: bool, own: DatasetFacts, tmp_path: Path
) -> None:
    DAMAGES[damage](tmp_path / "set" / NAME)
    order = sets.order(sets.spec(), own, tmp_path, **({"cache_bytes": 100} if streamed else {}))
    heard, last = sets.failed(order)
    assert (last.error.fault, last.error.code, last.error.retryable) == ("system", "dataset_changed", True)
    assert NAME in last.error.message
    assert heard.of(Planned) == []
    assert not list((Path(order.cache) / "shelf").glob("[!.]*"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_changes_while_it_is_streamed_is_named(damage: str, own: DatasetFacts, tmp_path: Path) -> None:
    def strike(message: Any) -> None:
        if getattr(message, "code", "") == "train.first_step":
            DAMAGES[damage](tmp_path / "set" / NAME)

    heard, last = sets.failed(sets.order(sets.spec(), own, tmp_path, cache_bytes=100), strike)
    assert (last.error.fault, last.error.code) == ("system", "dataset_changed")
    assert NAME in last.error.message
    assert "data.streaming" in heard.codes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_changes_between_two_looks_is_named_before_it_is_decoded(
    damage: str, own: DatasetFacts, tmp_path: Path
) -> None:
    encoded = Encoded(own, "train")
    DAMAGES[damage](tmp_path / "set" / NAME)
    with pytest.raises(SystemFault, match=NAME):  # and no fatal signal, as from a map of what is no more there
        encoded.read(range(len(encoded)))


def test_a_shard_that_was_only_touched_is_looked_at_again_and_used(own: DatasetFacts, tmp_path: Path) -> None:
    def touch(message: Any) -> None:
        if getattr(message, "code", "") == "train.first_step":
            os.utime(tmp_path / "set" / NAME)

    sets.finished(sets.order(sets.spec(), own, tmp_path, cache_bytes=100), touch)


def test_what_was_decoded_needs_the_shards_no_more(own: DatasetFacts, tmp_path: Path) -> None:
    first = sets.order(sets.spec(), own, tmp_path / "first")
    sets.carry_out(first)

    def strike(message: Any) -> None:
        if getattr(message, "code", "") == "train.first_step":
            cut(tmp_path / "set" / NAME)

    second = sets.order(sets.spec(), own, tmp_path / "second")
    heard, _ = sets.finished(second, strike)
    assert sets.weights_sha256(first) == sets.weights_sha256(second)
    assert "data.decoded" in heard.codes()
    damaged = hashlib.sha256((tmp_path / "set" / NAME).read_bytes()).hexdigest()
    assert damaged not in {shard.sha256 for shard in own.shards}


def test_what_a_library_of_the_gpu_cannot_allocate_is_out_of_memory_too() -> None:
    message = "CUDA error: {} when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(message.format("CUBLAS_STATUS_ALLOC_FAILED")))
    assert not is_out_of_memory(RuntimeError(message.format("CUBLAS_STATUS_INVALID_VALUE")))


def test_the_events_of_trouble_are_warnings(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Budget(monkeypatch, most=1000)
    heard, _ = sets.failed(sets.order(sets.spec("simclr", **PAIRS), digits, tmp_path))
    told = [event for event in heard.of(Event) if event.code.startswith("memory.")]
    assert told
    assert {event.level for event in told} == {"warning"}
