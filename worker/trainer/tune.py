"""Measure what `auto` depends on, on this host: `python -m worker.trainer.tune --cache FOLDER` prints lines of JSON.

A small convolutional network, a perceptron and a small transformer take real steps (forward under autocast, backward,
fused optimiser) on one random batch, in every precision, memory format and number of threads that a plan may choose.
Nothing else of a run is timed: augmentation and decoding do not depend on these choices.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.domain.spec import Optimizer, Training
from worker.parts import backbones, compute, machine, memo, optim, tuning
from worker.parts.machine import Hardware
from worker.parts.memo import Memo, MemoryFormat, Precision, Row
from worker.parts.tuning import Plan, Workload

SECONDS = 20.0  # for everything but compiling
CLASSES = 10
SIZE = 32
MOST_STEPS = 200


@dataclass(frozen=True)
class Network:
    """A stand-in for its family, small enough for a second per measurement."""

    family: str
    architecture: dict[str, Any]
    batch: int


NETWORKS = (
    Network("convolutional", {"architecture": "small_cnn", "width": 0.5}, 64),
    Network("mlp", {"architecture": "mlp", "hidden": [512, 256]}, 256),
    Network("vit", {"architecture": "small_vit", "patch": 4, "width": 96, "depth": 4, "heads": 3}, 64),
)


@dataclass(frozen=True)
class Way:
    """One combination to measure."""

    network: Network
    precision: Precision
    memory_format: MemoryFormat
    threads: int
    compile: bool = False


def ways(hardware: Hardware, *, compiled: bool) -> list[Way]:
    """List what there is to choose on this hardware."""
    precisions: list[Precision] = ["float32", "bfloat16"] if hardware.bfloat16 else ["float32"]
    if hardware.device == "cuda" and not hardware.bfloat16:
        precisions.append("float16")
    counts = thread_counts(hardware.threads) if hardware.device == "cpu" else [hardware.threads]
    found: list[Way] = []
    for network in NETWORKS:
        formats: list[MemoryFormat] = ["contiguous"]
        if network.family == "convolutional":
            formats.append("channels_last")
        found += [Way(network, p, f, n) for n in counts for p in precisions for f in formats]
        if compiled and hardware.compiler:
            found.append(Way(network, precisions[-1], formats[-1], hardware.threads, compile=True))
    return found


def thread_counts(most: int) -> list[int]:
    """Give 1, 2, 4 and so on, and the most itself."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


Rate = Callable[[Way, Hardware, float], Row]


def measure(hardware: Hardware, *, compiled: bool, seconds: float = SECONDS, rate: Rate) -> Iterator[Row]:
    """Measure each way within its share of the time."""
    wanted = ways(hardware, compiled=compiled)
    for way in wanted:
        yield rate(way, hardware, seconds / len(wanted))


def rate_of(way: Way, hardware: Hardware, seconds: float) -> Row:
    """Time optimiser steps: two to warm up, then as many as fit `seconds`, at least two."""
    plan = _plan(way, hardware)
    device = torch.device(hardware.device)
    compute.settle(plan)
    backbone = backbones.build_backbone(
        {**way.network.architecture, "image_size": SIZE}, channels=3, image_size=SIZE, seed=0
    )
    module = nn.Sequential(backbone, nn.Linear(int(cast(Any, backbone.dimension)), CLASSES))
    compute.place(module, plan, device)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(way.network.batch, 3, SIZE, SIZE, generator=draws).to(device)
    images = compute.laid_out({"image": images}, plan)["image"]
    labels = torch.randint(CLASSES, (way.network.batch,), generator=draws).to(device)
    # At a rate of 0 the work is the same, and one batch is not learnt until its gradients are denormal and slow.
    optimizer = optim.build(optim.groups(module, ()), Optimizer.model_validate(plan.optimizer))
    optimizer.schedule(0.0, 0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "float16")
    if way.compile:
        backbone.compile()

    def step() -> None:
        with compute.autocast(plan, device):
            loss: Tensor = nn.functional.cross_entropy(module(images).float(), labels)
        scaler.scale(loss).backward()
        optimizer.step(scaler)
        optimizer.zero_grad()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begun = now()
    step()
    first = now() - begun
    step()
    begun, steps = now(), 0
    while steps < 2 or (steps < MOST_STEPS and now() - begun < seconds - first):
        step()
        steps += 1
    spent = now() - begun
    return Row(
        family=way.network.family, precision=way.precision, memory_format=way.memory_format, threads=way.threads,
        compile=way.compile, compile_seconds=round(first, 1) if way.compile else 0.0,
        samples_per_second=round(steps * way.network.batch / spent, 1),
    )  # fmt: skip


def _plan(way: Way, hardware: Hardware) -> Plan:
    training = Training(
        precision=way.precision, memory_format=way.memory_format, batch_size=way.network.batch, compile=way.compile
    )
    work = Workload("finetune", way.network.family, SIZE, 3, samples=10_000)
    plan = tuning.resolve(training, work, hardware, mean=(0.0,) * 3, std=(1.0,) * 3)
    return plan.model_copy(update={"threads": way.threads})


def main(arguments: Sequence[str] | None = None, *, rate: Rate = rate_of) -> int:
    """Measure, print each row, write the memo, print where."""
    parser = argparse.ArgumentParser(prog="python -m worker.trainer.tune", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="the folder that the jobs of this host share")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="the most that a job may use")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--compile", action="store_true", help="compile each network too; half a minute each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    hardware = machine.look(given.device, given.threads)
    total, rows = len(ways(hardware, compiled=given.compile)), list[Row]()
    for row in measure(hardware, compiled=given.compile, seconds=given.seconds, rate=rate):
        rows.append(row)
        print(json.dumps({"row": row.model_dump(), "done": len(rows), "of": total}), flush=True)
    found = Memo(
        date=datetime.now(UTC).date().isoformat(), fingerprint=machine.fingerprint(given.device), rows=tuple(rows)
    )
    path = memo.write(given.cache, hardware.device, found)
    print(json.dumps({"memo": str(path), "device": hardware.device, "date": found.date}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
