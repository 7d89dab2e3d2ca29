"""What a job would take, measured by running a few of its steps through the real loop: seconds, memory, disk."""

import resource
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from app.domain.errors import ResourceFault
from worker import loop
from worker.checkpoint import Checkpoints, Contents, size_bytes
from worker.data.features import Features
from worker.data.images import Images
from worker.data.source import Data, Part, Source
from worker.parts.tuning import Plan
from worker.recipe import Progress
from worker.report import Order, Reporter
from worker.trainer.assembly import Assembly, assemble, start

WARM_STEPS = 3
STEPS = 20
SECONDS = 20.0  # of measuring, at most


class _Weighed(Checkpoints):
    """Checkpoints that are weighed and not kept."""

    def __init__(self) -> None:
        self.bytes = 0

    def load(self) -> Contents | None:
        """There is none."""
        return None

    def save(self, contents: Contents, **_: Any) -> None:
        """Weigh it."""
        self.bytes = size_bytes(contents.tensors)


def run(order: Order, reporter: Reporter) -> dict[str, Any]:
    """Run the first steps of the job in `order.spec` and say what all of it would take.

    Returns:
        plan, steps, seconds_per_step, estimated_seconds, memory_bytes (the peak of the process, or of the device),
        disk_bytes (decoded images, outputs of a frozen prefix, the checkpoints that are kept), checkpoint_bytes,
        parameters.
    """
    made = assemble(order, reporter)
    reporter.planned(made.plan.model_dump(mode="json"), {})
    planned, made = made.plan, start(made, order, reporter, at_beginning=True)
    if made.plan != planned:
        reporter.planned(made.plan.model_dump(mode="json"), {})
    marks: list[float] = []

    def enough() -> bool:
        marks.append(time.monotonic())
        return len(marks) > WARM_STEPS + STEPS or marks[-1] - marks[0] > SECONDS

    weighed = _step(made, _share(made.plan), enough)
    settled = marks[WARM_STEPS:] if len(marks) > WARM_STEPS + 1 else marks
    seconds = (settled[-1] - settled[0]) / max(len(settled) - 1, 1)
    return {
        "plan": made.plan.model_dump(mode="json"),
        "steps": made.plan.steps,
        "seconds_per_step": seconds,
        "estimated_seconds": seconds * made.plan.steps,
        "memory_bytes": _peak_bytes(made.device),
        "disk_bytes": _cached_bytes(made.data) + 3 * weighed,
        "checkpoint_bytes": weighed,
        "parameters": sum(parameter.numel() for parameter in made.objective.parameters()),
    }


def _cached_bytes(data: Data) -> int:
    """Weigh what this run's samples take in the caches of the host, where those of other jobs lie as well."""
    found: dict[str, int] = {}
    waiting: list[Source | None] = [data.train, data.validation, data.test, data.probe]
    while waiting:
        source = waiting.pop()
        if isinstance(source, Images):
            found[source.key] = source.pixels.nbytes
        elif isinstance(source, Features):
            found[f"features {id(source)}"] = source.values.nbytes
        if isinstance(source, Features | Part):
            waiting.append(source.source)
    return sum(found.values())


def largest_batch(made: Assembly, first: int) -> int | None:
    """Find the largest batch that fits, trying `first` and its halves with one step each; None when none does."""
    batch = first
    while batch >= max(made.recipe.requires.min_batch, 1):
        try:
            _step(made, _share(made.plan).model_copy(update={"batch_size": batch, "accumulate": 1}), lambda: True)
        except (MemoryError, RuntimeError, ResourceFault, ValueError):  # the last is batch norm's, of one sample
            batch //= 2
        else:
            return batch
    return None


def _share(plan: Plan) -> Plan:
    """Give what one process of several does by itself: that is what its GPU must hold."""
    return plan.model_copy(update={"batch_size": plan.batch_size // plan.world_size, "world_size": 1})


def _step(made: Assembly, plan: Plan, enough: Callable[[], bool]) -> int:
    """Run steps of the real loop until `enough` says so; give the size of a checkpoint."""
    objective = cast(Any, made.objective)
    after_step: Callable[[Progress], None] | None = getattr(made.objective, "after_step", None)
    quiet, weighed = Reporter(), _Weighed()

    def note(progress: Progress) -> None:
        if after_step is not None:
            after_step(progress)
        if made.device.type == "cuda":
            torch.cuda.synchronize(made.device)
        if enough():
            quiet.want("pause")

    objective.after_step = note
    try:
        loop.train(
            made.objective, made.data, made.spec.training, plan, made.device, quiet, weighed, kind=made.recipe.kind
        )
    finally:
        del objective.after_step
    return weighed.bytes


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
