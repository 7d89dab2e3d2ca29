"""The engine against what its own model step could give: one resident random batch, no data path, the same plan.

`python -m tests.benchmarks.ceiling '{…}'` measures in a process of its own: `step` (forward, backward, optimiser on one
batch), `augmented` (the same with the recipe's augmentation of that batch), `forward` (one pass over the training set).
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.pairs import Bench, Numbers, Pair, workload
from tests.benchmarks.sides import THREADS, ours, run
from tests.benchmarks.specs import fine_tune

ROUNDS, SECONDS = 4, 5.0  # of either side, in turn: processes one after the other find the machine faster or slower


def asked(spec: Numbers, bench: Bench, folder: Path, model: Path | None = None) -> Numbers:
    """Give what the process is asked."""
    return {
        "spec": spec, "folder": str(folder), "cache": str(bench.cache), "threads": THREADS, "seconds": SECONDS,
        "ingested": str(bench.work / "ingested"), "model": str(model) if model else None,
    }  # fmt: skip


def _against(bench: Bench, architecture: str) -> Pair:
    folder = bench.part(10_000)
    network = {"architecture": architecture, "image_size": 32}
    spec = fine_tune(bench, network, epochs=1000, batch_size=128, max_seconds=SECONDS)
    engine: list[float] = []
    ceiling: list[Numbers] = []
    for number in range(ROUNDS):
        for side in ("engine", "ceiling") if number % 2 == 0 else ("ceiling", "engine"):
            if side == "engine":
                engine.append(ours(spec, bench, folder)["samples_per_second"])
            else:
                ceiling.append(run("ceiling", {**asked(spec, bench, folder), "what": "step"})[-1])
    bare, augmented = (statistics.fmean(each[name] for each in ceiling) for name in ("step", "augmented"))
    return Pair(statistics.fmean(engine), bare, more={"augmented_ceiling": augmented})


@workload("ceiling_resnet18_32", "samples/s", 0.95)
def resnet18(bench: Bench) -> Pair:
    """The engine with standard augmentation, against the bare model step on one resident random batch."""
    return _against(bench, "resnet18")


@workload("ceiling_small_cnn_32", "samples/s", 0.8)
def small_cnn(bench: Bench) -> Pair:
    """The same with our small network, whose step is short."""
    return _against(bench, "small_cnn")


def _measure(asked: Numbers) -> Numbers:
    import torch

    from tests.benchmarks.ours import assembled
    from worker.data.source import in_order
    from worker.parts import compute, optim
    from worker.parts.seed import generator
    from worker.recipe import Progress

    made = assembled(asked)
    plan, device, module = made.plan, made.device, made.objective
    compute.settle(plan)
    compute.place(module, plan, device)

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    if asked["what"] == "forward":
        backbone: Any = module.backbone
        backbone.eval()
        batches = list(in_order(made.data.train, 256))
        with torch.inference_mode(), compute.autocast(plan, device):
            for rows in [*batches[:3]]:  # warm
                backbone(compute.laid_out(made.data.ready(made.data.train.batch(rows), device), plan)["image"])
            begun = settled()
            for rows in batches:
                backbone(compute.laid_out(made.data.ready(made.data.train.batch(rows), device), plan)["image"])
            return {"seconds": settled() - begun}

    objective: Any = module
    optimizer = optim.build(optim.groups(module, objective.parameter_groups(made.spec.training)), _optimizer(plan))
    # At a rate of 0 the work is the same, and one batch is not learnt until its gradients are denormal and slow.
    optimizer.schedule(0.0, made.spec.training.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    draws = torch.Generator().manual_seed(0)
    shape = (plan.batch_size, plan.channels, plan.image_size, plan.image_size)
    raw = {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws),
        "label": torch.randint(0, len(made.info.classes), (plan.batch_size,), generator=draws),
    }
    raw = {name: value.to(device) for name, value in raw.items()}
    resident = compute.laid_out(made.data.ready(raw, device), plan)
    module.train()
    progress = Progress(0, 1, 0, 1)

    def rate(augmented: bool, seconds: float) -> float:
        steps, begun, warm = 0, 0.0, 5
        while True:
            ready = resident
            if augmented:
                draws = generator(0, "inputs", steps, device=device)
                ready = compute.laid_out(made.data.ready(raw, device, draws), plan)
            with compute.autocast(plan, device):
                loss = module(ready, progress)["loss"]
            loss.backward()
            optimizer.step(scaler)
            optimizer.zero_grad()
            steps += 1
            if steps == warm:
                begun = settled()
            elif steps > warm and steps % 10 == 0 and settled() - begun > seconds:
                return (steps - warm) * plan.batch_size / (settled() - begun)

    bare = rate(False, asked["seconds"])
    return {"step": bare, "augmented": rate(True, asked["seconds"] / 3)}


def _optimizer(plan: Any) -> Any:
    from app.domain.spec import Optimizer

    return Optimizer.model_validate(plan.optimizer)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(_measure({**json.loads(sys.argv[1]), "out": scratch})))
