"""The plan of a run that goes on: what of it this machine has to do otherwise."""

from typing import Any

from worker.parts import choices
from worker.parts.machine import Hardware
from worker.parts.tuning import Plan


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
