"""The plan of a run that goes on: which one counts, and what of it this machine has to do otherwise."""

from typing import Any

from app.domain.spec import Training
from worker.parts import choices
from worker.parts.machine import Hardware
from worker.parts.tuning import Plan


def latest(committed: Plan | None, saved: Plan | None) -> Plan | None:
    """Choose between the plan that is committed for a job and that of its checkpoint.

    The checkpoint's is how the run computed last, on whatever machine that was. The committed one is later only after
    memory ran out: it is committed before the first step under it, and the next checkpoint may never have come.
    """
    if committed is None or saved is None:
        return committed or saved
    return committed if _spared(committed) > _spared(saved) else saved


def _spared(plan: Plan) -> tuple[int, bool]:
    """Measure how far a plan goes to spare memory; within a run that only grows (trainer/trouble.py)."""
    return plan.accumulate, plan.checkpoint_activations


def taken_over(plan: Plan, family: str, hardware: Hardware, *, asked: Training) -> Plan:
    """Give an earlier attempt's plan as this machine can carry it out; what it only would not have chosen stays.

    bfloat16 that nobody asked for does not, on a processor without instructions for it: on two AVX2 cores a product of
    it makes 0.3 GFLOP/s, and 135 in float32; a convolution 14, and 142.
    """
    changed: dict[str, Any] = {"device": hardware.device}
    reasons = dict(plan.reasons)
    if plan.compile and not hardware.compiles:
        changed["compile"], reasons["compile"] = False, "the run began compiled, and this worker has no C++ compiler"
    slow = plan.precision == "bfloat16" and not hardware.bfloat16 and asked.precision == "auto"
    if hardware.device == "cpu" and (plan.precision == "float16" or slow):
        changed["precision"], why = choices.precision(family, hardware)
        reasons["precision"] = f"the run began in {plan.precision}, which has no usable arithmetic here; now: {why}"
    if hardware.device == "cpu" and plan.float32_matmul == "medium" and not hardware.onednn_is_exact:
        changed["float32_matmul"] = "highest"
        reasons["float32_matmul"] = "the run began on a processor that does not round these products; this one does"
    return plan.model_copy(update={**changed, "reasons": reasons})
