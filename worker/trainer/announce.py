"""The last word before step 0: the plan goes to the supervisor, and whether this machine is the one it was made on."""

import torch

from worker.parts import machine
from worker.parts.tuning import Plan
from worker.report import Order, Reporter


def announce(
    plan: Plan, device: torch.device, order: Order, reporter: Reporter, *, first: Plan | None = None
) -> None:  # fmt: skip
    """Report the plan and wait until it is committed; say so where the result will not be the same to the bit.

    Args:
        first: the plan of the attempt before.
    """
    found = machine.fingerprint(device.type)
    before = order.fingerprint
    differs = sorted(
        key for key in {*found, *(before or {})} if before is not None and before.get(key) != found.get(key)
    )
    if plan.device != device.type:
        differs.append("device")
    if first is not None and plan.world_size != first.world_size:
        differs.append("world_size")
    if differs:
        reporter.event(
            "resume.inexact",
            f"This worker differs from the one where the run began ({', '.join(differs)}): the result will be as good "
            "but not the same to the bit.", level="warning", differs=differs,
        )  # fmt: skip
    reporter.planned(plan.model_dump(mode="json"), found, exact=not differs)
