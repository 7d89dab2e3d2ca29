"""The processes of one job, started, watched and ended as for a user."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault, ResourceFault
from tests.waiting import until
from tests.worker import sets
from tests.worker.objectives import Hungry
from tests.worker.partner import MLP, SGD
from worker.data.images import Images
from worker.report import Message, Planned, Saved
from worker.trainer import assembly, devices, ranks, training

pytestmark = pytest.mark.worker


def job(**training: Any) -> dict[str, Any]:
    return {**sets.spec(), "model": MLP, "training": {"epochs": 4, "batch_size": 32, **SGD, **training}}


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "rank" in child.cmdline()]


def test_an_order_for_two_processes_gives_the_model_of_one(many: DatasetFacts, tmp_path: Path) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for count in (None, 2):
        order = sets.order(job(), many, tmp_path / str(count), processes=count)
        heard, _ = sets.finished(order)
        assert heard.codes().count("processes.joined") == (1 if count else 0)
        assert heard.of(Planned)[0].plan["world_size"] == (count or 1)
        weights.append(load_file(Path(order.scratch) / "model" / "model.safetensors"))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-4), name
    assert children() == []
    assert not list(tmp_path.glob("*/scratch/.processes-*"))


def test_a_killed_process_ends_the_run_as_a_system_fault(many: DatasetFacts, tmp_path: Path) -> None:
    order = sets.order(job(epochs=5000, checkpoint_every=50), many, tmp_path, processes=2)

    def kill(message: Message) -> None:
        if isinstance(message, Saved) and message.step == 50:
            (child,) = children()
            child.kill()

    heard, last = sets.failed(order, kill)
    assert (last.error.fault, last.error.code, last.error.retryable) == ("system", "process_lost", True)
    assert "Process 2 of 2 was killed (SIGKILL)" in last.error.message
    assert heard.of(Saved), "what was saved before is kept"
    assert children() == []


def test_a_failure_in_one_of_the_others_alone_is_said_before_it_leaves_the_group(
    many: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-m", "tests.worker.failing", "rank"))
    _, last = sets.failed(sets.order(job(epochs=5000), many, tmp_path, processes=2))
    assert (last.error.fault, last.error.code) == ("data", "broken_row")
    assert children() == []


@pytest.mark.parametrize(
    ("error", "code"), [(DataFault("Row 7 is broken.", code="row"), "row"), (RuntimeError("bad"), "crash")]
)
def test_a_failure_in_the_first_process_alone_is_said_and_the_group_is_left_when_nobody_else_is_in_it(
    many: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    # On GPUs the others, who wait for this process's gradients, keep whoever destroys the group waiting as well.
    monkeypatch.setattr(dist, "destroy_process_group", lambda: until(lambda: not children(), 20, "the others hang"))
    leave, with_others = distributed_c10d._abort_process_group, list[int]()

    def abort() -> None:
        with_others.append(len(children()))
        leave()

    monkeypatch.setattr(distributed_c10d, "_abort_process_group", abort)
    monkeypatch.setattr(ranks, "NOTICE_SECONDS", 0.5)

    def fail(message: Message) -> None:
        if isinstance(message, Saved):
            raise error

    _, last = sets.failed(sets.order(job(epochs=5000, checkpoint_every=20), many, tmp_path, processes=2), fail)
    assert (last.error.code, with_others) == (code, [0])
    assert str(error) in last.error.message


def test_no_process_outlives_the_first_one(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(job(epochs=5000)))
    command = [
        sys.executable, "-m", "worker.trainer", "run", str(tmp_path / "spec.json"), "--data", "builtin:digits",
        "--out", str(tmp_path / "out"), "--threads", "1", "--device", "cpu", "--processes", "2",
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if json.loads(line).get("code") == "train.first_step":
            break
    others = psutil.Process(first.pid).children(recursive=True)
    assert len([other for other in others if "rank" in other.cmdline()]) == 1
    assert all(os.getpgid(other.pid) == os.getpgid(first.pid) for other in others), "one group, one kill"
    first.kill()
    first.communicate()
    _, alive = psutil.wait_procs(others, timeout=60)
    assert alive == []


def test_going_on_with_another_number_of_processes_is_not_exact(many: DatasetFacts, tmp_path: Path) -> None:
    order = sets.order(job(checkpoint_every=5), many, tmp_path / "two", processes=2)
    heard, last = sets.finished(order, lambda message: "drain" if isinstance(message, Saved) else None)
    assert last.outcome == "drained"
    planned = heard.of(Planned)[0]
    given = {
        "plan": planned.plan, "attempt": 2,
        "checkpoint": str(Path(order.scratch) / heard.of(Saved)[-1].file),
    }  # fmt: skip
    heard, last = sets.finished(sets.order(job(), many, tmp_path / "one", **given))
    assert last.outcome == "succeeded"
    again = heard.of(Planned)[0]
    assert (again.plan["world_size"], again.exact) == (1, False)
    event = next(message for message in heard.messages if getattr(message, "code", "") == "resume.inexact")
    assert event.data["differs"] == ["world_size"]  # type: ignore[attr-defined]


@pytest.mark.long
def test_out_of_memory_halves_the_micro_batch_of_all(
    many: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hungry(monkeypatch, most=8)
    heard, _ = sets.finished(sets.order(job(), many, tmp_path, processes=2))
    assert [message.plan["accumulate"] for message in heard.of(Planned)] == [1, 2]
    assert children() == []


def test_a_job_gets_a_process_for_each_gpu_and_not_more(
    many: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    for gpus, device, found in ((2, cuda, 2), (1, cuda, 1), (2, torch.device("cpu"), 1)):
        order = sets.order({**job(), "resources": {"gpus": gpus}}, many, tmp_path)
        assert devices.choose_processes(assembly.read_spec(order.spec)[0], order, device) == found
    order = sets.order({**job(), "resources": {"gpus": 3}}, many, tmp_path)
    with pytest.raises(ResourceFault, match="3 GPUs are wanted, and this worker gives 2"):
        devices.choose_processes(assembly.read_spec(order.spec)[0], order, cuda)


def test_what_draws_without_a_generator_is_seeded_on_the_gpu_of_the_job(
    many: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda"):
        order = sets.order(job(), many, tmp_path, device=name)
        assert devices.choose_device(assembly.read_spec(order.spec)[0], order) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]


def test_images_live_on_a_gpu_where_all_splits_together_take_a_quarter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total_memory=4 * 1000 * 48)  # a quarter holds a thousand images
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    pixels, labels = torch.zeros(600, 3, 4, 4, dtype=torch.uint8), torch.zeros(600, dtype=torch.int64)
    train = Images(pixels, labels, 0, (0.5,) * 3, (0.2,) * 3, "key")
    cuda = torch.device("cuda", 0)
    assert devices.fits(train, cuda, 1000)
    assert not devices.fits(train, cuda, 1001), "the training images alone would"
    assert not devices.fits(train, torch.device("cpu"), 600)


@pytest.mark.long
def test_out_of_memory_of_a_coupled_loss_computes_activations_twice_in_all(
    many: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(*given: Any, **named: Any) -> Any:
        made = assembly.assemble(*given, **named)
        if not made.plan.checkpoint_activations:
            made.objective.forward = starve
        return made

    def starve(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "assemble", assemble)
    body = {**job(epochs=1, batch_size=128), "recipe": "simclr", "model": sets.NETWORK}
    heard, last = sets.finished(sets.order(body, many, tmp_path, processes=2))
    assert last.outcome == "succeeded"
    assert [message.plan["checkpoint_activations"] for message in heard.of(Planned)] == [False, True]
    assert children() == []


def test_an_uneven_batch_is_refused_and_the_message_says_what_would_do(many: DatasetFacts, tmp_path: Path) -> None:
    _, last = sets.failed(sets.order(job(batch_size=50), many, tmp_path, processes=4))
    assert last.error.fault == "user"
    assert last.error.message.startswith("training.batch_size: a batch of 50 does not divide evenly among 4 processes")
    assert "use 48 or 52" in last.error.message
