"""What `auto` comes to."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from app.domain.errors import UserFault
from app.domain.spec import Optimizer, Training
from worker import cgroup, sources
from worker.parts import choices, machine, tuning
from worker.parts.machine import Hardware
from worker.parts.taken_over import latest, taken_over
from worker.parts.tuning import Plan, Workload

pytestmark = pytest.mark.unit
AMD = Hardware("cpu", threads=2, bfloat16=True, compiler=True)
OLD = Hardware("cpu", threads=2, bfloat16=False, compiler=False, onednn_is_exact=False)
GPU = Hardware("cuda", threads=8, bfloat16=True, compiler=True)
CIFAR = Workload(kind="finetune", family="convolutional", image_size=32, channels=3, samples=45_000)


def resolve(work: Workload = CIFAR, hardware: Hardware = AMD, **training: Any) -> Plan:
    return tuning.resolve(Training.model_validate(training), work, hardware, mean=(0.5,) * 3, std=(0.2,) * 3)


def test_the_fast_path_is_the_default() -> None:
    plan = resolve()
    assert (plan.precision, plan.memory_format, plan.float32_matmul) == ("bfloat16", "channels_last", "medium")
    assert (plan.compile, plan.batch_size, plan.accumulate, plan.threads) == (False, 256, 1, 2)
    assert (plan.steps_per_epoch, plan.steps) == (175, 1750)
    assert plan == resolve(), "the same question, the same answer"
    assert set(plan.reasons) >= {"precision", "memory_format", "float32_matmul", "compile", "batch_size"}
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_processor_without_bfloat16_computes_in_float32() -> None:
    plan = resolve(hardware=OLD)
    assert (plan.precision, plan.float32_matmul) == ("float32", "highest")


def test_each_family_gets_what_suits_it() -> None:
    assert resolve(replace(CIFAR, family="mlp")).precision == "bfloat16"
    vit = resolve(replace(CIFAR, family="vit"))
    assert (vit.precision, vit.memory_format) == ("bfloat16", "contiguous")
    assert vit.learning_rate < resolve().learning_rate
    assert (resolve(hardware=GPU).float32_matmul, resolve(hardware=GPU).batch_size) == ("high", 1024)


@pytest.mark.parametrize(("samples", "batch"), [(90, 16), (20, 16), (7, 7), (1297, 128), (5000, 256)])
def test_few_samples_get_small_batches_and_still_several_steps(samples: int, batch: int) -> None:
    plan = resolve(replace(CIFAR, samples=samples))
    assert plan.batch_size == batch
    assert plan.steps_per_epoch == samples // batch
    assert ("make few steps" in plan.reasons["batch_size"]) == (samples < 128)


@pytest.mark.parametrize("couples", [False, True])
@pytest.mark.parametrize(("samples", "batch"), [(600, 32), (1297, 32), (10_000, 64), (20_000, 128), (33_000, 256)])
def test_pretraining_gets_more_steps_of_as_few_samples(samples: int, batch: int, couples: bool) -> None:
    work = replace(CIFAR, kind="pretrain", samples=samples, couples_batch=couples)
    assert resolve(work).batch_size == (max(batch, 64) if couples else batch)
    assert resolve(work, batch_size=200).batch_size == 200
    assert resolve(replace(work, kind="finetune")).batch_size > batch or batch == 256


def test_steps_take_the_place_of_epochs() -> None:
    plan = resolve(epochs=3, steps=400)
    assert (plan.steps, plan.steps_per_epoch, plan.epochs) == (400, 175, 3)
    assert resolve(steps=7).epochs == 1
    assert resolve(steps=350).epochs == 2


def test_what_was_asked_is_kept_and_said() -> None:
    plan = resolve(batch_size=100, accumulate=4, learning_rate=0.5, precision="float32", memory_format="contiguous")
    assert (plan.batch_size, plan.accumulate, plan.learning_rate) == (100, 4, 0.5)
    assert (plan.precision, plan.memory_format) == ("float32", "contiguous")
    assert {plan.reasons[field] for field in ("batch_size", "accumulate", "learning_rate")} == {"as asked"}


def test_a_batch_larger_than_the_data_shrinks_and_says_so() -> None:
    plan = resolve(replace(CIFAR, samples=50), batch_size=64)
    assert plan.batch_size == 50
    assert "only 50" in plan.reasons["batch_size"]


@pytest.mark.parametrize(
    ("training", "field"),
    [
        ({"batch_size": 10, "accumulate": 3}, "accumulate"),
        ({"precision": "float16"}, "precision"),
        ({"compile": True}, "compile"),
    ],
)
def test_what_cannot_work_names_its_field(training: dict[str, Any], field: str) -> None:
    with pytest.raises(UserFault, match=f"training.{field}"):
        resolve(hardware=OLD, **training)


def test_a_recipe_that_needs_a_larger_batch_says_so() -> None:
    with pytest.raises(UserFault, match="at least 4 samples per batch"):
        resolve(replace(CIFAR, samples=3, couples_batch=True, min_batch=4))
    with pytest.raises(UserFault, match="at least 4 samples per micro-batch, and 3 of a batch of 9 have 3"):
        resolve(replace(CIFAR, min_batch=4), batch_size=9, accumulate=3)


@pytest.mark.parametrize(("samples", "every"), [(50_000, 1), (22_222, 2), (1297, 14), (100, 14)])
def test_probes_cost_under_three_percent(samples: int, every: int) -> None:
    assert tuning.probe_every(samples) == every
    probed = min(samples, tuning.PROBE_ROWS)
    assert probed / (3 * samples * every) <= 0.03


def test_probes_are_rarer_where_a_step_is_cheap() -> None:
    assert [tuning.probe_every(10_000, passes) for passes in (3.0, 2.0, 1.0)] == [3, 5, 9]
    pretraining = replace(CIFAR, kind="pretrain", samples=10_000)
    assert resolve(pretraining).probe_every == 3
    assert resolve(replace(pretraining, step_passes=2.0)).probe_every == 5


def test_an_mlp_is_probed_less_often_but_not_only_at_its_end() -> None:
    pretraining = replace(CIFAR, kind="pretrain", samples=10_000, family="mlp")
    assert [resolve(pretraining, epochs=epochs).probe_every for epochs in (100, 10, 4)] == [12, 5, 3]
    assert resolve(pretraining, epochs=100, stop_on_collapse=True).probe_every == 3
    waiting = {"metric": "probe/knn_accuracy"}
    assert resolve(pretraining, epochs=100, early_stopping=waiting).probe_every == 3
    assert resolve(pretraining, hardware=GPU, epochs=100).probe_every == 3


FACTS = {
    "device", "fingerprint", "world_size", "deterministic", "checkpoint_activations", "optimizer", "epochs",
    "steps_per_epoch", "steps", "samples", "image_size", "channels", "mean", "std", "prefix_views", "reasons",
}  # fmt: skip


@pytest.mark.parametrize("family", ["convolutional", "hierarchical", "vit", "mlp"])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("hardware", [AMD, OLD, GPU], ids=["cpu", "old cpu", "gpu"])
def test_every_choice_has_its_reason(hardware: Hardware, kind: str, family: str) -> None:
    plan = resolve(replace(CIFAR, kind=kind, family=family), hardware)
    assert plan.reasons.keys() >= Plan.model_fields.keys() - FACTS
    assert all(plan.reasons.values())


def test_no_figure_of_a_processor_is_said_of_a_gpu() -> None:
    plan = resolve(hardware=GPU)
    for field in ("precision", "memory_format", "float32_matmul", "compile", "small_map_products"):
        assert "not measured here" in plan.reasons[field], field
        assert "times" not in plan.reasons[field], field
        assert " s " not in plan.reasons[field], field
    assert "after 26 s" in resolve().reasons["compile"]


def test_where_there_are_no_instructions_for_bfloat16_no_reason_boasts_of_it() -> None:
    plan = resolve(hardware=OLD)
    assert (plan.precision, plan.memory_format, plan.small_map_products) == ("float32", "channels_last", True)
    for field in ("memory_format", "small_map_products"):
        assert "AVX2" in plan.reasons[field], field
        assert "bf" not in plan.reasons[field], field
    asked = resolve(hardware=OLD, precision="bfloat16")
    assert not asked.small_map_products
    assert "slower than its convolutions" in asked.reasons["small_map_products"]


def test_muon_is_given_float32_where_a_gpu_has_no_bfloat16() -> None:
    plan = resolve(hardware=replace(GPU, bfloat16=False), optimizer="muon")
    assert plan.precision == "float32"
    assert "muon" in plan.reasons["precision"]
    assert resolve(hardware=replace(GPU, bfloat16=False)).precision == "float16"


def test_the_reason_of_a_rate_gives_the_rate() -> None:
    for batch in (16, 64, 256):
        plan = resolve(batch_size=batch)
        base, _, rule = plan.reasons["learning_rate"].partition(" x ")
        assert rule.startswith("root(max(batch, 64) / 256)")
        assert plan.learning_rate == pytest.approx(float(base) * (max(batch, 64) / 256) ** 0.5, rel=0.01)


@pytest.mark.parametrize("cache", ["resident", "memory_map", "stream"])
def test_the_reason_of_a_cache_is_its_own(cache: Any) -> None:
    plan = tuning.resolve(Training(), CIFAR, GPU, mean=(0.5,) * 3, std=(0.2,) * 3, cache=cache)
    assert (plan.cache, plan.reasons["cache"]) == (cache, choices.CACHES[cache])


def test_rates_follow_the_batch() -> None:
    def rate(batch: int, name: Any) -> float:
        return resolve(batch_size=batch, optimizer=Optimizer(name=name)).learning_rate

    assert rate(512, "sgd") == pytest.approx(2 * rate(256, "sgd"))
    assert rate(1024, "adamw") == pytest.approx(2 * rate(256, "adamw"))


def test_this_machine_can_be_looked_at() -> None:
    seen = machine.look("cpu", 3)
    assert (seen.device, seen.threads) == ("cpu", 3)
    assert seen == machine.look("cpu", 3)
    found = machine.fingerprint("cpu")
    assert found == machine.fingerprint("cpu")
    assert {"torch", "processor", "instructions"} <= set(found)
    assert "engine" not in found, "or every update would throw away what is kept under it"
    assert machine.provenance("cpu") == {**found, "engine": sources.digest()}


def test_products_of_float32_that_round_to_bfloat16_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX, under the precision that lets oneDNN multiply."""
    real = torch.Tensor.__matmul__

    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float64 or torch.get_float32_matmul_precision() != "medium":
            return real(a, b)
        return real(a.bfloat16().float(), b.bfloat16().float())

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not machine.onednn_is_exact.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a.double(), b.double()).to(a.dtype))
    assert machine.onednn_is_exact.__wrapped__()
    assert torch.get_float32_matmul_precision() == before


EXACT = replace(OLD, onednn_is_exact=True)


def take_over(begun: Plan, hardware: Hardware, **asked: Any) -> Plan:
    return taken_over(begun, "convolutional", hardware, asked=Training(**asked))


def test_what_this_machine_cannot_do_is_done_otherwise_and_has_its_reason() -> None:
    begun = resolve(compile=True).model_copy(update={"precision": "float16", "accumulate": 2})
    made = take_over(begun, EXACT)
    assert (made.compile, made.precision) == (False, "float32")
    assert "no C++ compiler" in made.reasons["compile"]
    assert "float16" in made.reasons["precision"]
    assert "no bfloat16 instructions" in made.reasons["precision"]
    kept = made.model_copy(update={each: getattr(begun, each) for each in ("compile", "precision", "reasons")})
    assert kept == begun, "and nothing else"
    assert take_over(begun, AMD).precision == "bfloat16"
    assert take_over(begun, AMD).compile is True
    assert take_over(made, EXACT) == made, "every process of a run comes to the same"


def test_products_that_would_be_rounded_here_are_not() -> None:
    begun = resolve(precision="float32")
    assert begun.float32_matmul == "medium"
    made = take_over(begun, replace(AMD, onednn_is_exact=False))
    assert made.float32_matmul == "highest"
    assert "this one does" in made.reasons["float32_matmul"]


def test_bfloat16_that_is_asked_for_is_said_to_be_slow_where_there_are_no_instructions_for_it() -> None:
    assert "400 times" in resolve(hardware=OLD, precision="bfloat16").reasons["precision"]
    assert resolve(precision="bfloat16").reasons["precision"] == "as asked"


def test_bfloat16_goes_on_where_there_are_no_instructions_for_it_only_if_it_was_asked_for() -> None:
    begun = resolve()
    made = take_over(begun, OLD)
    assert (begun.precision, made.precision) == ("bfloat16", "float32")
    assert "began in bfloat16" in made.reasons["precision"]
    assert take_over(begun, EXACT, precision="bfloat16") == begun
    assert take_over(begun, replace(GPU, bfloat16=False)).precision == "bfloat16", "a GPU computes it, slowly"


def test_what_this_machine_would_merely_not_have_chosen_stays() -> None:
    begun = resolve()
    assert take_over(begun, replace(AMD, threads=8)) == begun
    half = resolve(hardware=replace(GPU, compiler=False), precision="float16", compile=True)
    assert take_over(half, replace(GPU, compiler=False)) == half
    assert take_over(half, AMD).device == "cpu"
    assert take_over(begun, GPU).device == "cuda"


def test_the_plan_that_came_last_is_the_one_that_spares_more_memory() -> None:
    begun = resolve()
    halved, twice = (begun.model_copy(update=each) for each in ({"accumulate": 2}, {"checkpoint_activations": True}))
    for later in (halved, twice):
        assert latest(later, begun) is later, "committed after memory ran out, before the next checkpoint"
        assert latest(begun, later) is later
    elsewhere = begun.model_copy(update={"precision": "float32"})
    assert latest(begun, elsewhere) is elsewhere, "the checkpoint's is how the run computed last"
    assert latest(None, begun) is begun
    assert latest(begun, None) is begun
    assert latest(None, None) is None


def test_a_limit_on_memory_counts_as_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, memory in ((None, host), (10**6, 10**6), (host + 1, host)):
        monkeypatch.setattr(cgroup, "memory_bytes", lambda limit=limit: limit)
        assert machine.memory_bytes() == machine.look("cpu", 1).memory_bytes == memory
