"""Where a run computes: the device, how many processes, and what fits there."""

import torch

from app.domain.errors import ResourceFault, SystemFault
from app.domain.spec import Spec
from worker.data.images import Images
from worker.report import Order


def choose_device(spec: Spec, order: Order) -> torch.device:
    """Give the device of the order, unless the job wants the CPU.

    Raises:
        ResourceFault: the job wants a GPU and was given none, which a server's queue never does.
        SystemFault: the GPU of the order does not answer.
    """
    wanted = spec.resources.device
    if not order.device.startswith("cuda"):
        if wanted == "cuda":
            raise ResourceFault(
                "resources.device: the job asks for a GPU (cuda), and this machine has none.", code="no_such_device",
                hint='Set resources.device to "auto" or "cpu", or run it where there is a GPU.',
            )  # fmt: skip
        return torch.device("cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemFault(
            f"The GPU of this worker ({order.device}) does not answer.", code="device_lost",
            hint="Look at its driver (nvidia-smi); another worker may go on.",
        )  # fmt: skip
    device = torch.device(order.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # what draws without a generator is seeded where that is
    return device


def choose_processes(spec: Spec, order: Order, device: torch.device) -> int:
    """Give how many processes train together: as many as were ordered, else one per GPU of the job.

    Raises:
        ResourceFault: this worker has fewer GPUs.
    """
    wanted = order.processes or (spec.resources.gpus if device.type == "cuda" else 1)
    if device.type == "cuda" and wanted > torch.cuda.device_count():
        raise ResourceFault(
            f"resources.gpus: {wanted} GPUs are wanted, and this worker gives {torch.cuda.device_count()}.",
            code="too_few_gpus",
        )
    return wanted


def fits(images: Images, device: torch.device, rows: int) -> bool:
    """Say whether decoded images shall live on the device: on a GPU, where all `rows` of the dataset take a quarter of
    its memory at most, because its splits are there together."""
    if device.type != "cuda":
        return False
    needed = images.pixels.nbytes * rows // max(len(images), 1)
    return needed <= torch.cuda.get_device_properties(device).total_memory // 4
