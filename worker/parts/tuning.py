"""What `auto` comes to: a pure function of what is trained, its shapes and the hardware. The plan says why.

Batch size and learning rate depend on the data, never on time; what turns out not to fit into memory goes in smaller
micro-batches later on (trainer/trouble.py). Nothing is measured on the way to the first step and nothing changes in the
middle of a run. The figures behind the choices were measured with torch 2.15 on two 2-core machines. With AVX512-bf16
ResNet-18 with the small stem at 32 pixels trains 90 images/s in contiguous float32 and 180 with bf16 autocast in
channels_last; with its usual stem 1,080 either way, and 2,300 with small maps as products. With AVX2 that is 173 in
contiguous float32, 214 in channels_last, 467 with products. GPUs have no figures here, and the reasons (choices.py) say
so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.domain.errors import UserFault
from app.domain.spec import Optimizer, Training
from worker.parts import choices
from worker.parts.machine import Hardware
from worker.parts.memo import Memo, MemoryFormat, Precision


class Plan(BaseModel):
    """Every choice that decides the bits of a run; fixed before step 0 and used again by every later attempt.

    A field that this version does not know is another version's, whose fingerprint differs: `exact` is false then.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    device: str  # cpu or cuda; which one of several does not matter
    fingerprint: dict[str, Any] = {}  # of where the run began: what the bits depend on beside the plan
    world_size: int = 1
    threads: int
    precision: Precision
    memory_format: MemoryFormat
    float32_matmul: Literal["highest", "high", "medium"]
    compile: bool
    deterministic: bool
    batch_size: int
    accumulate: int
    checkpoint_activations: bool = False  # stages of the backbone run twice a step; only after memory ran out
    learning_rate: float
    optimizer: dict[str, Any]
    epochs: int
    steps_per_epoch: int
    steps: int
    samples: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    cache: Literal["resident", "memory_map", "stream"]
    small_map_products: bool = False  # see parts/small_maps.py
    prefix_views: int = 0  # views of every sample whose frozen prefix is cached; 0 is no such cache
    log_every: int
    probe_every: int = 0  # epochs; 0 is never
    reasons: dict[str, str] = {}


EPOCH_STEPS = 8  # of an epoch at least, where the batch size is ours to choose
# Without labels more is to be learnt from as few images: the five methods that had fewer steps all read better in equal
# seconds with more, smaller ones (10,000 CIFAR-10 images, small_cnn, 45 s: SimCLR 40 -> 43 % k-NN, VICReg 31 -> 44).
PRETRAINING_EPOCH_STEPS = 128
STEP_PASSES = 3.0  # forward passes that a step takes: one, and twice that backward


@dataclass(frozen=True)
class Workload:
    """What a choice may depend on, apart from the hardware."""

    kind: str
    family: str  # convolutional, hierarchical, vit, mlp
    image_size: int
    channels: int
    samples: int
    couples_batch: bool = False
    min_batch: int = 1
    step_passes: float = STEP_PASSES  # see Objective
    pretrained: bool = False  # starts from weights that are worth keeping


def batch_size(work: Workload, hardware: Hardware) -> tuple[int, str]:
    """Choose a batch: the table's for the image size, smaller where an epoch would have too few steps."""
    side = work.image_size
    table = 256 if side <= 32 else 128 if side <= 64 else 64 if side <= 128 else 32
    if hardware.device == "cuda":
        table *= 4
    if work.couples_batch:
        table *= 2  # contrast needs many samples beside each other
    # Contrast needs some samples beside each other; batch statistics alone are well enough off with fewer.
    pretrains = work.kind == "pretrain"
    least = max(work.min_batch, 64 if work.couples_batch else 32 if pretrains else 16)
    steps = PRETRAINING_EPOCH_STEPS if pretrains else EPOCH_STEPS
    many_steps = 2 ** int(math.log2(max(work.samples // steps, 1)))
    chosen = min(max(min(table, many_steps), least), work.samples)
    why = f"{table} suits {side}-pixel images on {hardware.device}"
    if chosen < table:
        enough = "give steps enough at" if chosen <= many_steps else "make few steps, but a batch has at least"
        why += f"; {work.samples} samples {enough} {chosen}"
    return chosen, why


def learning_rate(work: Workload, optimizer: Optimizer, batch: int, preset: str | None = None) -> tuple[float, str]:
    """Choose a peak rate: linear in the batch for sgd, with its root for the adaptive ones."""
    if preset == "fast" and optimizer.name == "muon" and work.family == "convolutional" and not work.pretrained:
        # CIFAR-10, small_cnn of half the width, 2 epochs: 80.0 % with 0.01, 81.6 with 0.03, 80.0 with 0.06 (batch 512).
        return _round(0.03 * math.sqrt(batch / 256)), "0.03 x root(batch / 256): few epochs, from scratch, under muon"
    if optimizer.name == "sgd":
        base = 0.01 if work.pretrained and work.kind == "finetune" else 0.1
        return _round(base * batch / 256), f"{base} x batch / 256 (linear scaling, arXiv 1706.02677)"
    # Few-label digits, small_cnn: 1e-3 to 2e-3 was best at batch 16, 4e-3 at batch 128 for SimCLR.
    base = 2e-3 if work.family in ("convolutional", "mlp") else 1e-3
    if work.kind == "pretrain" and work.family in ("convolutional", "mlp"):
        base *= 2
    if work.kind == "finetune" and work.pretrained:
        base /= 2
    rate = _round(base * math.sqrt(max(batch, 64) / 256))
    return rate, f"{base} x root(max(batch, 64) / 256) for {optimizer.name} on a {work.family} network"


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def resolve(
    training: Training, work: Workload, hardware: Hardware, *, mean: tuple[float, ...], std: tuple[float, ...],
    cache: Literal["resident", "memory_map", "stream"] = "memory_map", processes: int = 1, memo: Memo | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> Plan:  # fmt: skip
    """Turn every `auto` into a choice, with its reason; what `memo` has measured on this host comes before the table.

    `processes` share every batch evenly.

    Raises:
        UserFault: what was asked for explicitly cannot work here; the message names the field.
    """
    reasons: dict[str, str] = {}

    def choose(field: str, asked: Any, auto: tuple[Any, str]) -> Any:
        reasons[field] = "as asked" if asked != "auto" else auto[1]
        return auto[0] if asked == "auto" else asked

    optimizer = training.optimizer if isinstance(training.optimizer, Optimizer) else Optimizer(name=training.optimizer)
    batch = choose("batch_size", training.batch_size, batch_size(work, hardware))
    if batch > work.samples:
        reasons["batch_size"] = f"there are only {work.samples} training samples, {batch} were asked for"
        batch = work.samples
    accumulate = choose("accumulate", training.accumulate, (1, "the batch is processed at once"))
    parts = processes * accumulate
    if batch % parts and batch > parts and batch != training.batch_size:
        batch -= batch % parts
        reasons["batch_size"] += f", to the last multiple of {parts}"
    if batch < work.min_batch:
        raise UserFault(
            f"training.batch_size: this recipe needs at least {work.min_batch} samples per batch, and {batch} are "
            f"available; give it more data.", code="batch_too_small",
        )  # fmt: skip
    if batch % accumulate:
        raise UserFault(
            f"training.accumulate: a batch of {batch} does not divide into {accumulate} micro-batches.",
            code="accumulate",
        )
    if batch // accumulate < work.min_batch:
        raise UserFault(
            f"training.accumulate: this recipe needs at least {work.min_batch} samples per micro-batch, and "
            f"{accumulate} of a batch of {batch} have {batch // accumulate}.", code="accumulate",
        )  # fmt: skip
    _refuse_uneven(batch, accumulate, processes)
    steps_per_epoch = max(1, work.samples // batch)
    steps = training.steps or steps_per_epoch * training.epochs
    epochs = math.ceil(steps / steps_per_epoch)  # the last one may be cut short
    threads, reasons["threads"] = thread_count(work.family, work.image_size, hardware, memo)
    by_table = choices.precision(work.family, hardware)
    seen = memo.precision(work.family, threads, by_table[0]) if memo is not None else None
    by_itself = seen or by_table
    if by_itself[0] == "float16" and optimizer.name == "muon":
        by_itself = "float32", "muon needs bfloat16 or float32, and this GPU has no bfloat16"
    chosen_precision: Precision = choose("precision", training.precision, by_itself)
    if chosen_precision == "float16" and hardware.device == "cpu":
        raise UserFault(
            "training.precision: float16 has no usable arithmetic on a CPU; use auto or float32.", code="precision"
        )
    if chosen_precision == "bfloat16" and hardware.device == "cpu" and not hardware.bfloat16:
        reasons["precision"] += "; this processor has no instructions for it, and takes up to 400 times as long"
    if chosen_precision == "float16" and optimizer.name == "muon":
        raise UserFault("training.optimizer: muon needs bfloat16 or float32, not float16.", code="precision")
    laid = choices.memory_format(work.family, hardware)
    seen_laid = memo.memory_format(work.family, threads, chosen_precision, laid[0]) if memo is not None else None
    chosen_format = choose("memory_format", training.memory_format, seen_laid or laid)
    seen_compiled = None
    if memo is not None:
        seen_compiled = memo.compile(work.family, threads, chosen_precision, chosen_format, steps * batch)
    compiled = _compile(training, work.family, hardware, reasons, seen_compiled)
    products, reasons["small_map_products"] = choices.small_map_products(hardware, chosen_precision, compiled=compiled)
    matmul, reasons["float32_matmul"] = choices.float32_matmul(hardware)
    reasons["cache"] = choices.CACHES[cache]
    reasons["log_every"] = "200 times in a run, and every 50 steps at least"
    probed, reasons["probe_every"] = 0, "only pretraining probes its features"
    if work.kind == "pretrain":
        probed, reasons["probe_every"] = _probed(work, hardware, training, epochs)
    return Plan(
        device=hardware.device,
        fingerprint=dict(fingerprint or {}),
        world_size=processes,
        threads=threads,
        precision=chosen_precision,
        memory_format=chosen_format,
        float32_matmul=matmul,
        compile=compiled,
        small_map_products=products,
        deterministic=training.deterministic,
        batch_size=batch,
        accumulate=accumulate,
        learning_rate=choose(
            "learning_rate", training.learning_rate, learning_rate(work, optimizer, batch, training.preset)
        ),
        optimizer=optimizer.model_dump(mode="json"),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        samples=work.samples,
        image_size=work.image_size,
        channels=work.channels,
        mean=mean,
        std=std,
        cache=cache,
        log_every=max(1, min(50, steps // 200)),
        probe_every=probed,
        reasons=reasons,
    )  # fmt: skip


def spread(plan: Plan, processes: int) -> Plan:
    """Give the plan of a run that goes on with another number of processes: the same batches, shared otherwise.

    Raises:
        UserFault: its batches do not divide so.
    """
    _refuse_uneven(plan.batch_size, plan.accumulate, processes)
    return plan.model_copy(update={"world_size": processes})


def _refuse_uneven(batch: int, accumulate: int, processes: int) -> None:
    parts = processes * accumulate
    if batch % parts:
        below = batch - batch % parts
        which = f"{below} or {below + parts}" if below else f"{parts}"
        micro = f" in {accumulate} micro-batches each" if accumulate > 1 else ""
        raise UserFault(
            f"training.batch_size: a batch of {batch} does not divide evenly among {processes} processes{micro}; use "
            f"{which}.", code="batch_size",
        )  # fmt: skip


def thread_count(family: str, image_size: int, hardware: Hardware, memo: Memo | None) -> tuple[int, str]:
    """Choose how many of a slot's threads a run uses: all, or fewer where that was measured to be faster."""
    if memo is not None and hardware.device == "cpu" and image_size <= SMALL_SIDE:
        seen = memo.threads(family, hardware.threads)
        if seen is not None:
            return seen
    return hardware.threads, "all that this slot has"


PROBE_ROWS = 2000
MLP_PROBE_PASSES = 4.0  # a VAE 784-400-20: 55 ms a probe, 2.3 ms a step of 128
VIEW_ROWS = 250  # of which two views are compared as well: an eighth of them
SMALL_SIDE = 64  # pixels; the memo's threads were measured at 32, and larger images give each of them more to do


def _probed(work: Workload, hardware: Hardware, training: Training, epochs: int) -> tuple[int, str]:
    every, why = probe_every(work.samples, work.step_passes), "as often as costs under 3 % of training"
    stops = training.stop_on_collapse or (
        training.early_stopping and training.early_stopping.metric.startswith("probe")
    )
    if work.family != "mlp" or hardware.device != "cpu" or stops:
        return every, why
    rarer = probe_every(work.samples, work.step_passes, passes=MLP_PROBE_PASSES)
    return max(every, min(rarer, epochs // 2)), f"{why}, and twice in a run at least"


def probe_every(samples: int, step_passes: float = STEP_PASSES, *, passes: float = 1.0) -> int:
    """Choose how many epochs lie between two probes, so that probing costs under 3 % of training.

    A probe is one forward pass over at most PROBE_ROWS samples and over two views of an eighth; an epoch of training is
    `step_passes` such passes over all of them. `passes` is more than one where what is computed from the features takes
    longer than such a pass.
    """
    rows = min(samples, PROBE_ROWS)
    rows += 2 * view_rows(rows)
    return max(1, math.ceil(passes * rows / (0.03 * step_passes * samples)))


def view_rows(probed: int) -> int:
    """Choose of how many probed rows two views are compared."""
    return max(1, min(VIEW_ROWS, probed // 8))


def _compile(
    training: Training, family: str, hardware: Hardware, reasons: dict[str, str], seen: tuple[bool, str] | None = None
) -> bool:
    if training.compile == "auto" and seen is not None and hardware.compiler:
        reasons["compile"] = seen[1]
        return seen[0]
    if training.compile == "auto":
        reasons["compile"] = choices.no_compile(family, hardware)
        return False
    if training.compile and not hardware.compiles:
        raise UserFault("training.compile: this worker has no C++ compiler; use false or auto.", code="no_compiler")
    reasons["compile"] = "as asked"
    return training.compile
