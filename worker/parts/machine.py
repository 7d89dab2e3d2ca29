"""The machine that a run is on: what choices may depend on, and what its bits depend on."""

import contextlib
import ctypes
import os
import platform
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision

from worker import cgroup, sources


@dataclass(frozen=True)
class Hardware:
    """The class of machine; two machines that compare equal give the same plan."""

    device: Literal["cpu", "cuda"]
    threads: int
    bfloat16: bool
    compiler: bool
    onednn_is_exact: bool = True
    memory_bytes: int = 8 * 2**30

    @property
    def compiles(self) -> bool:
        """Say whether torch can compile here: for a CPU it needs a C++ compiler."""
        return self.compiler or self.device == "cuda"


def look(device: str, threads: int) -> Hardware:
    """Look at this machine; nothing is measured but the rounding of one product."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None
    if device.startswith("cuda"):
        return Hardware(
            "cuda", threads, bfloat16=torch.cuda.get_device_capability(device) >= (8, 0), compiler=compiler,
            memory_bytes=torch.cuda.get_device_properties(device).total_memory,
        )  # fmt: skip
    return Hardware(
        "cpu", threads, bfloat16=has_bfloat16(), compiler=compiler, onednn_is_exact=onednn_is_exact(),
        memory_bytes=memory_bytes(),
    )  # fmt: skip


def memory_bytes() -> int:
    """Give the memory that this process may use: the host's, or less where its control group says so."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(host, cgroup.memory_bytes() or host)


def has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_cpuinfo("flags", "Features").split()))


@cache
def onednn_is_exact() -> bool:
    """Compare one product under `medium` with float64: a machine with AMX may really round to bfloat16 (2.9e-3)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 96, 96, generator=generator).unbind(0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        product = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return bool(((product - exact).abs().max() / exact.abs().max()) < 1e-5)


@cache
def keep_freed_memory() -> None:
    """Let this process keep what its tensors free, up to 2 GB: every step asks for the same again.

    By its defaults glibc gives such pages back to the system, which clears and maps them anew. Without that the
    standard augmentation makes 98 to 106 thousand images of 32 pixels a second on one core, not 41 to 61.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # nothing but glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.items():
            mallopt(option, value)


# malloc.h: M_MMAP_THRESHOLD, as high as it may be; M_TRIM_THRESHOLD; M_TOP_PAD.
_MALLOC = {-3: 32 * 2**20, -1: 2**31 - 1, -2: 64 * 2**20}


def provenance(device: str) -> dict[str, Any]:
    """Describe what the bits of a run depend on beside its plan: this machine, and this version of our own code."""
    return {**fingerprint(device), "engine": sources.digest()}


def fingerprint(device: str) -> dict[str, Any]:
    """Describe the machine as far as bits and speeds depend on it; what is kept for later jobs is kept under this.

    Our own code is not in it, or every update would throw away decoded images, features and measurements.
    """
    found: dict[str, Any] = {
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "machine": platform.machine(),
        "processor": _cpuinfo("model name", "CPU part") or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(),
    }
    if device.startswith("cuda"):
        found |= {
            "gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def _cpuinfo(*names: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in names), "")
