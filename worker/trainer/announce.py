"""The last word before step 0: the plan goes to the supervisor, and whether this run will end with the same bits."""

import torch

from worker.parts import machine
from worker.parts.tuning import Plan
from worker.report import Reporter


def announce(plan: Plan, device: torch.device, reporter: Reporter, *, first: Plan | None = None) -> None:
    """Report the plan and wait until it is committed; say so where the result will not be the same to the bit.

    Args:
        first: the plan under which was computed what this attempt goes on from.
    """
    found, differs = machine.provenance(device.type), list[str]()
    if first is not None:
        differs = sorted(key for key in {*found, *first.fingerprint} if first.fingerprint.get(key) != found.get(key))
        # Without `deterministic` two runs on one and the same GPU differ as well.
        differs += ["device"] if first.device != device.type else []
        differs += ["kernels"] if device.type == "cuda" and not plan.deterministic else []
        # What this machine or this worker does otherwise (taken_over.py), what turned out to have no room for a cache,
        # then what is done after memory ran out.
        changed = (
            "compile", "precision", "float32_matmul", "world_size", "prefix_views", "accumulate",
            "checkpoint_activations",
        )  # fmt: skip
        differs += [name for name in changed if getattr(plan, name) != getattr(first, name)]
    if differs:
        reporter.event(
            "resume.inexact",
            f"Not everything is as it was where the run began ({', '.join(differs)}): the result will be as good but "
            "not the same to the bit.", level="warning", differs=differs,
        )  # fmt: skip
    reporter.planned(plan.model_dump(mode="json"), found, exact=not differs)
