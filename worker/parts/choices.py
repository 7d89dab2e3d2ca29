"""What the table says of a device and a family of networks: each choice with its reason, by what was measured where."""

from typing import Literal

from worker.parts.machine import Hardware
from worker.parts.memo import MemoryFormat, Precision

UNMEASURED = "not measured here"
RESNET = "ResNet-18 at 32 pixels on 2 cores with AVX512-bf16"
RESNET_AVX2 = "ResNet-18 at 32 pixels on 2 AVX2 cores"
CACHES = {
    "resident": "the decoded images fit into a quarter of this GPU's memory",
    "memory_map": "decoded once, into a file that is mapped into memory",
    "stream": "the decoded images are more than this worker may keep, and are decoded while training",
}


def precision(family: str, hardware: Hardware) -> tuple[Precision, str]:
    """Choose what autocast computes in; float16 is never chosen on a CPU, where it is hundreds of times slower."""
    if not hardware.bfloat16:
        if hardware.device == "cuda":
            return "float16", "this GPU has no bfloat16"
        return "float32", "this processor has no bfloat16 instructions"
    if hardware.device == "cuda":
        return "bfloat16", f"autocast, for the tensor cores of this GPU; {UNMEASURED}"
    if family == "mlp":
        return "bfloat16", "autocast: 1.2 to 1.5 times as fast as float32 for an mlp at 28 pixels and above"
    if family == "convolutional":
        return "bfloat16", f"autocast: {RESNET} trains twice as fast with the small stem, and alike with the usual one"
    return "bfloat16", f"autocast, because this processor multiplies bfloat16; {UNMEASURED} for a {family} network"


def memory_format(family: str, hardware: Hardware) -> tuple[MemoryFormat, str]:
    """Choose how images and filters lie in memory."""
    if family != "convolutional":
        return "contiguous", "this network has no spatial convolutions to speak of"
    if hardware.device == "cuda":
        return "channels_last", f"what convolutions on tensor cores read; {UNMEASURED}"
    if not hardware.bfloat16:
        return "channels_last", f"in float32, {RESNET_AVX2} trains 1.2 times as fast"
    return "channels_last", f"beside bfloat16, {RESNET} trains twice as fast with the small stem, alike with the usual"


def float32_matmul(hardware: Hardware) -> tuple[Literal["highest", "high", "medium"], str]:
    """Choose what may compute float32 products."""
    if hardware.device == "cuda":
        return "high", f"TF32 for what stays float32; {UNMEASURED}"
    if hardware.onednn_is_exact:
        return (
            "medium",
            "oneDNN: on an AMD processor 2.2 times faster than MKL with AVX512, 1.2 times with AVX2; on this one with "
            "errors of true float32",
        )
    return "highest", "the fast path rounds to bfloat16 on this processor"


def small_map_products(hardware: Hardware, precision: Precision, *, compiled: bool) -> tuple[bool, str]:
    """Choose whether convolutions over small maps are products (small_maps.py)."""
    if hardware.device == "cuda":
        return False, f"a GPU keeps its own kernels; {UNMEASURED}"
    if compiled:
        return False, "the compiler chooses the kernels"
    if precision == "bfloat16" and not hardware.bfloat16:
        return False, "without instructions for bfloat16 its products are slower than its convolutions"
    if precision == "bfloat16":
        return True, f"maps smaller than their kernel: a step of {RESNET} takes 52 ms, not 94"
    return True, f"maps smaller than their kernel: a step of {RESNET_AVX2} takes 274 ms, not 599"


def no_compile(family: str, hardware: Hardware) -> str:
    """Say why nothing is compiled that was not asked for."""
    if hardware.device == "cpu" and family == "mlp":
        return "a VAE's step of 128 took 10 ms compiled and 6 to 7 as it is (torch 2.15, one core with AVX512-bf16)"
    if hardware.device == "cpu" and family == "convolutional":
        return "0.3 to 1.25 times as fast on 2 cores with AVX512-bf16, after 26 s of compiling"
    return f"{UNMEASURED} for a {family} network on {hardware.device}, and compiling takes its time"
