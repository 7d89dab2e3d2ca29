"""How a plan's choices reach torch: threads, matmul precision, autocast, memory layout, determinism."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from worker.parts import machine
from worker.parts.small_maps import take_products
from worker.parts.tuning import Plan

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def settle(plan: Plan) -> None:
    """Set what is global in torch, whatever another plan has set before."""
    machine.keep_freed_memory()
    torch.set_num_threads(plan.threads)
    torch.set_float32_matmul_precision(plan.float32_matmul)
    ordered = plan.device == "cuda" and plan.deterministic
    if plan.device == "cuda":
        torch.backends.cudnn.allow_tf32 = plan.float32_matmul != "highest"
        torch.backends.cudnn.benchmark = not plan.deterministic
    if ordered:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.are_deterministic_algorithms_enabled() != ordered:  # saying so imports Inductor's settings
        # What has no deterministic form runs and warns; the steps of our recipes have nothing of the kind.
        torch.use_deterministic_algorithms(ordered, warn_only=True)
    # The fused attentions go backward deterministically only where nothing may merely warn.
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(not ordered)


@contextmanager
def uncompiled(plan: Plan) -> Iterator[None]:
    """Call compiled modules as they are for a while: batches of other sizes are not worth 10 to 30 s of compiling each,
    and whether they or a step came first, which a resumed run changes, would decide what is compiled."""
    with torch.compiler.set_stance("force_eager") if plan.compile else nullcontext():
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let a GPU round no float32 to TF32 for a while, neither in products nor in convolutions."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


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
