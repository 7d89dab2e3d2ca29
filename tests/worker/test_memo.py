"""What was measured on this host refines a plan, and only there; nothing here is timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain.spec import Training
from app.local import compute
from worker import ingest
from worker.parts import machine, memo, tuning
from worker.parts.machine import Hardware
from worker.parts.memo import Memo, Row
from worker.parts.tuning import Plan, Workload
from worker.report import Reporter
from worker.trainer import tune
from worker.trainer.assembly import assemble
from worker.trainer.local import local_order

pytestmark = pytest.mark.worker
AMD = Hardware("cpu", threads=2, bfloat16=True, compiler=True)
CIFAR = Workload(kind="finetune", family="convolutional", image_size=32, channels=3, samples=45_000)
# A machine on which everything is the other way round than the table says, in whole numbers.
RATES = {
    ("float32", "contiguous", 1): 400.0,
    ("float32", "contiguous", 2): 300.0,
    ("float32", "channels_last", 1): 100.0,
    ("float32", "channels_last", 2): 90.0,
    ("bfloat16", "contiguous", 1): 200.0,
    ("bfloat16", "contiguous", 2): 150.0,
    ("bfloat16", "channels_last", 1): 50.0,
    ("bfloat16", "channels_last", 2): 40.0,
}
CPU = {"torch": "2.13", "processor": "this one"}


def made_up(way: tune.Way, hardware: Hardware, seconds: float) -> Row:
    """Stand in for a measurement."""
    rate = RATES[way.precision, way.memory_format, way.threads] * (10 if way.compile else 1)
    return Row(
        family=way.network.family, precision=way.precision, memory_format=way.memory_format, threads=way.threads,
        compile=way.compile, compile_seconds=20.0 if way.compile else 0.0, samples_per_second=rate,
    )  # fmt: skip


def measured(*, compiled: bool = False) -> Memo:
    rows = tuple(tune.measure(AMD, compiled=compiled, rate=made_up))
    return Memo(date="2026-11-22", fingerprint=CPU, rows=rows)


def resolve(found: Memo | None, work: Workload = CIFAR, **training: Any) -> Plan:
    mean, std = (0.5,) * 3, (0.2,) * 3
    return tuning.resolve(Training.model_validate(training), work, AMD, mean=mean, std=std, memo=found)


def test_what_was_measured_decides_and_says_so() -> None:
    plan = resolve(measured())
    assert (plan.precision, plan.memory_format, plan.threads) == ("float32", "contiguous", 1)
    assert plan.reasons["precision"] == (
        "measured on this host on 2026-11-22: 400 samples/s, against 200 with bfloat16"
    )
    assert plan.reasons["memory_format"].endswith("400 samples/s, against 100 with channels_last")
    assert plan.reasons["threads"].endswith("400 samples/s, against 300 with 2")
    assert resolve(None).precision == "bfloat16"
    assert resolve(measured()) == plan, "the same memo, the same plan"


def test_what_was_asked_stays() -> None:
    plan = resolve(measured(), precision="bfloat16", memory_format="channels_last")
    assert (plan.precision, plan.memory_format) == ("bfloat16", "channels_last")
    assert plan.reasons["precision"] == plan.reasons["memory_format"] == "as asked"


def test_a_family_or_a_size_that_was_not_measured_keeps_the_table() -> None:
    hierarchical = Workload("finetune", "hierarchical", 32, 3, samples=45_000)
    assert resolve(measured(), hierarchical) == resolve(None, hierarchical)
    large = Workload("finetune", "convolutional", 224, 3, samples=45_000)
    assert resolve(measured(), large).threads == 2, "threads were measured on small images"


def test_a_small_difference_is_noise() -> None:
    same: dict[str, Any] = {"family": "convolutional", "memory_format": "channels_last", "threads": 2}
    near = (
        Row(precision="bfloat16", samples_per_second=100.0, **same),
        Row(precision="float32", samples_per_second=104.0, **same),
    )
    found = Memo(date="2026-11-22", fingerprint=CPU, rows=near)
    assert resolve(found).precision == "bfloat16"


def test_compiling_must_pay() -> None:
    rows = tuple(row for row in measured(compiled=True).rows if row.threads == 2)
    found = Memo(date="2026-11-22", fingerprint=CPU, rows=rows)
    way: dict[str, Any] = {"precision": "bfloat16", "memory_format": "channels_last"}  # 40 samples/s, 400 compiled
    few = Workload("finetune", "convolutional", 32, 3, samples=1000)
    assert resolve(found, epochs=1, **way).compile is True
    assert resolve(found, few, epochs=1, **way).compile is False
    assert "for 20 s of compiling" in resolve(found, **way).reasons["compile"]
    assert resolve(found, compile=False, **way).compile is False
    assert resolve(found).compile is False, "float32 was not measured compiled"


def test_only_what_this_host_measured_with_this_torch_counts(tmp_path: Path) -> None:
    found = measured()
    memo.write(tmp_path, "cpu", found)
    assert memo.read(tmp_path, "cpu", CPU) == found
    assert memo.read(tmp_path, "cpu", {**CPU, "torch": "2.14"}) is None
    assert memo.read(tmp_path, "cuda", CPU) is None
    memo.write(tmp_path, "cuda", found)
    assert memo.read(tmp_path, "cpu", CPU) == found, "another device's entry leaves it alone"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"cpu": {"rows": 3}}', '{"cpu": null}'])
def test_a_damaged_memo_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / memo.NAME).write_text(text)
    assert memo.read(tmp_path, "cpu", CPU) is None


def test_measuring_writes_the_memo_of_this_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--cache", str(tmp_path), "--threads", "2", "--device", "cpu"], rate=made_up) == 0
    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert last["memo"] == str(tmp_path / memo.NAME)
    assert [row["done"] for row in rows] == list(range(1, rows[0]["of"] + 1))
    found = memo.read(tmp_path, "cpu", machine.fingerprint("cpu"))
    assert found is not None
    assert len(found.rows) == len(rows)
    assert {row.family for row in found.rows} == {"convolutional", "mlp", "vit"}


def test_a_run_follows_the_memo_of_its_host_and_a_later_attempt_its_first_plan(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = ingest.ingest_builtin("digits", tmp_path / "data", cache, threads=1)
    spec = {"recipe": "image_classification", "model": {"architecture": "small_cnn", "width": 0.25}}
    order = local_order(spec, data.facts, tmp_path / "scratch", cache, threads=2)
    assert assemble(order, Reporter()).plan.threads == 2
    memo.write(cache, "cpu", measured().model_copy(update={"fingerprint": machine.fingerprint("cpu")}))
    made = assemble(order, Reporter())
    assert (made.plan.precision, made.plan.threads, torch.get_num_threads()) == ("float32", 1, 1)
    assert made.plan.reasons["precision"].startswith("measured on this host on 2026-11-22")
    first = made.plan.model_copy(update={"threads": 2})
    assert assemble(order, Reporter(), plan=first).plan == first


def test_every_core_count_up_to_the_most_is_tried() -> None:
    assert tune.thread_counts(1) == [1]
    assert tune.thread_counts(2) == [1, 2]
    assert tune.thread_counts(6) == [1, 2, 4, 6]
    compiled = [way for way in tune.ways(AMD, compiled=True) if way.compile]
    assert [way.network.family for way in compiled] == ["convolutional", "mlp", "vit"]
    assert not any(way.compile for way in tune.ways(Hardware("cpu", 2, True, compiler=False), compiled=True))


def test_a_real_measurement_gives_a_rate() -> None:
    way = tune.Way(tune.NETWORKS[1], "float32", "contiguous", 1)
    row = tune.rate_of(way, Hardware("cpu", 1, False, compiler=False), seconds=0.05)
    assert row.samples_per_second > 0


def test_the_doctor_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    *rows, last = compute.measure(tmp_path, 1, seconds=0.1)
    assert last["memo"] == str(tmp_path / memo.NAME)
    assert all(said["row"]["samples_per_second"] > 0 for said in rows)
    assert memo.read(tmp_path, last["device"], machine.fingerprint(last["device"])) is not None


def test_a_measurement_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(compute.MeasuringFailed, match="positive"):
        list(compute.measure(tmp_path, 0))
    assert not (tmp_path / memo.NAME).exists()
