"""How a plan's choices reach torch: threads, matmul precision, autocast, memory layout, determinism."""

import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from worker.parts.small_maps import take_products
from worker.parts.tuning import Plan

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def settle(plan: Plan) -> None:
    """Set what is global in torch."""
    torch.set_num_threads(plan.threads)
    torch.set_float32_matmul_precision(plan.float32_matmul)
    if plan.device == "cuda":
        torch.backends.cudnn.allow_tf32 = plan.float32_matmul != "highest"
        torch.backends.cudnn.benchmark = not plan.deterministic
        if plan.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # What has no deterministic form (few backward passes, none in common networks) runs and warns.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(plan: Plan, device: torch.device) -> AbstractContextManager[object]:
    """Give the context of a forward pass."""
    dtype = _DTYPES.get(plan.precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def place(module: nn.Module, plan: Plan, device: torch.device) -> nn.Module:
    """Move a module to the device and into the plan's layout."""
    module.to(device)
    if plan.memory_format == "channels_last":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if plan.small_map_products:
        take_products(module)
    return module


def laid_out(batch: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Bring the images of a batch into the plan's memory format."""
    if plan.memory_format != "channels_last":
        return batch
    return {
        key: value.contiguous(memory_format=torch.channels_last) if key.startswith("image") else value
        for key, value in batch.items()
    }
