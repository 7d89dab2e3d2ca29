"""What a plan sets in torch for the whole process, and that the next plan undoes it."""

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from app.domain.spec import Training
from tests.worker import objectives
from worker.parts import compute
from worker.parts.tuning import Plan

pytestmark = pytest.mark.worker
ON_CPU = objectives.plan(Training())
ON_GPU = ON_CPU.model_copy(update={"device": "cuda", "float32_matmul": "high"})


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    compute.settle(ON_GPU)
    compute.settle(ON_CPU)


def attention() -> str:
    """Name the backward pass of an attention."""
    rows: Tensor = torch.randn(1, 2, 8, 16, requires_grad=True)
    made = torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)
    assert made.grad_fn is not None
    return made.grad_fn.name()


def test_a_run_that_shall_repeat_uses_no_attention_whose_gradient_does_not() -> None:
    """torch chooses by the same switches on a CPU."""
    assert "Flash" in attention()
    compute.settle(ON_GPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert "Flash" not in attention()
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("after", [ON_CPU, ON_GPU.model_copy(update={"deterministic": False})], ids=["cpu", "faster"])
def test_the_next_run_of_a_process_is_not_bound_by_it(after: Plan) -> None:
    compute.settle(ON_GPU)
    compute.settle(after)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "Flash" in attention()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_float32_is_not_rounded_for_a_while() -> None:
    compute.settle(ON_GPU)
    with compute.exact_float32():
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)


FAULTS = """
import resource, sys, torch
from worker.parts import machine
if sys.argv[1] == "kept":
    machine.keep_freed_memory()
torch.set_num_threads(1)
seen = []
for _ in range(40):
    made = [torch.ones(2**18) for _ in range(8)]
    del made
    seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(seen[-1] - seen[10])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_a_step_frees_is_kept_for_the_next_one() -> None:
    # What glibc begins with; where it goes from there is a matter of chance.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout)

    pages = 4096 / resource.getpagesize()
    assert faults("given back") > 10_000 * pages
    assert faults("kept") < 100
