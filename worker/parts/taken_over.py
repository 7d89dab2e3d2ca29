"""The plan of a run that goes on: which one counts, and what of it this machine has to do otherwise."""

from typing import Any

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


def taken_over(plan: Plan, family: str, hardware: Hardware) -> Plan:
    """Give an earlier attempt's plan as this machine can carry it out; what it only would not have chosen stays.

    So does bfloat16 on a processor without instructions for it, which rounds alike and takes its time.
    """
    changed: dict[str, Any] = {"device": hardware.device}
    reasons = dict(plan.reasons)
    if plan.compile and not hardware.compiles:
        changed["compile"], reasons["compile"] = False, "the run began compiled, and this worker has no C++ compiler"
    if plan.precision == "float16" and hardware.device == "cpu":
        changed["precision"], why = choices.precision(family, hardware)
        reasons["precision"] = f"the run began in float16, which has no usable arithmetic on a CPU; here: {why}"
    return plan.model_copy(update={**changed, "reasons": reasons})
