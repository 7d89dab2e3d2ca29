"""What goes wrong while training: less memory where that helps, and a name for what nobody foresaw."""

import traceback
from typing import Any, cast

from torch.nn.modules.batchnorm import _BatchNorm

from app.domain.errors import JobFault, ResourceFault, SystemFault, UserFault
from worker.disk import is_full
from worker.parts.memory import is_out_of_memory
from worker.parts.tuning import Plan
from worker.report import Reporter
from worker.trainer import measure
from worker.trainer.assembly import Assembly

TRACE_LINES = 30


def with_less_memory(made: Assembly, reporter: Reporter) -> Plan | None:
    """Take a smaller micro-batch, where that is the same computation but for batch norm; else keep fewer activations.

    The next one is the largest that divides the batch and is at most half of what did not fit: every attempt costs the
    steps since the last checkpoint, and so there are few of them. None where neither is left to do.
    """
    plan = made.plan
    micro = plan.batch_size // plan.accumulate
    if bool(cast(Any, made.objective).couples_batch):
        if not plan.checkpoint_activations:
            reporter.event(
                "memory.activations_recomputed",
                f"Out of memory: the loss of {made.recipe.name} ties the {micro} samples of a batch together, so it is "
                "not split; activations are computed a second time instead of being kept, which takes about a third "
                "longer.", level="warning", batch_size=micro,
            )  # fmt: skip
            why = {**plan.reasons, "checkpoint_activations": f"a batch of {micro} did not fit into memory without"}
            return plan.model_copy(update={"checkpoint_activations": True, "compile": False, "reasons": why})
        return None
    below = range(micro // 2, _least(made) - 1, -1)
    smaller = next((size for size in below if plan.batch_size % size == 0 == size % plan.world_size), None)
    if smaller is None:
        return None
    reporter.event(
        "memory.micro_batch_halved",
        f"Out of memory: each batch of {plan.batch_size} now goes in parts of {smaller} whose gradients add up. "
        "Batch norm sees the smaller parts.", level="warning", micro_batch=smaller,
    )  # fmt: skip
    why = {**plan.reasons, "accumulate": f"a micro-batch of {micro} did not fit into memory"}
    return plan.model_copy(update={"accumulate": plan.batch_size // smaller, "reasons": why})


def does_not_fit(made: Assembly) -> ResourceFault:
    """Say that nothing is left to do with less memory, and what would fit, which is tried."""
    plan = made.plan
    micro, each = plan.batch_size // plan.accumulate, plan.world_size
    if bool(cast(Any, made.objective).couples_batch):
        fits = measure.largest_batch(made, micro // 2 // each)
        return ResourceFault(
            f"A batch of {micro} does not fit into memory even when activations are computed twice, and it is not "
            f"split, because the loss of {made.recipe.name} ties its samples together.", code="out_of_memory",
            hint=_what_fits(fits, each),
        )  # fmt: skip
    fits = measure.largest_batch(made, micro // 2 // each) if micro // 2 >= _least(made) else None
    return ResourceFault(
        f"A micro-batch of {micro} does not fit into memory.", code="out_of_memory", hint=_what_fits(fits, each)
    )


def _least(made: Assembly) -> int:
    """Give the smallest micro-batch: batch norm of one sample alone may be an error of torch's, and is never what was
    asked for; processes share it."""
    normed = any(isinstance(module, _BatchNorm) and module.training for module in made.objective.modules())
    return max(made.plan.world_size, 2 if normed else 1)


def _what_fits(each: int | None, processes: int) -> str:
    if each is None:
        return "Use a smaller network or smaller images."
    return f"Set training.batch_size to {each * processes}."


def translated(error: Exception, reporter: Reporter) -> JobFault:
    """Class what nobody foresaw; the end of the trace goes into the job's log."""
    if is_full(error):
        return ResourceFault(
            f"The disk of the worker is full: {error}.", code="disk_full", hint="Free some space, then /retry."
        )
    if is_out_of_memory(error):
        return ResourceFault(f"Out of memory: {error}", code="out_of_memory", hint="Use a smaller network or images.")
    if isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel"):
        return UserFault(
            "Batch norm finds nothing to compare: a micro-batch is one sample, whose last maps are one pixel.",
            code="batch_too_small", phase="train",
            hint="Use at least two samples per micro-batch (training.batch_size over training.accumulate), or larger "
            "images.",
        )  # fmt: skip
    trace = "".join(traceback.format_exception(error)).splitlines()[-TRACE_LINES:]
    reporter.event("trainer.crashed", f"{type(error).__name__}: {error}", level="error", trace=trace)
    return SystemFault(f"The trainer crashed: {type(error).__name__}: {error}", code="crash")
