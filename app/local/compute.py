"""What this machine can compute with, seen from outside: torch is asked in a process of its own, never imported."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

_PROBE = """
import json, torch, torchvision
from worker.parts import machine
cuda = torch.cuda.is_available()
print(json.dumps({
    "capability": torch.backends.cpu.get_cpu_capability(),
    "onednn": torch.backends.mkldnn.is_available(),
    "threads": torch.get_num_threads(),
    "gpus": [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())] if cuda else [],
    "gpu_bf16": bool(cuda and torch.cuda.is_bf16_supported(including_emulation=False)),
    "fingerprints": {device: machine.fingerprint(device) for device in ("cpu", *(["cuda"] if cuda else []))},
}))
"""


def installed(package: str) -> str | None:
    """Give the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wanted_torch() -> str | None:
    """Give the torch version that the installed torchvision was built for: it loads with no other."""
    for line in requires("torchvision") or ():
        if found := re.match(r"torch\s*\(?==\s*([0-9.]+)", line):
            return found[1]
    return None


@functools.cache
def probe() -> dict[str, Any] | str:
    """Import torch and torchvision in a fresh process and give what it sees, or the last line of what went wrong."""
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "the import did not end within five minutes"
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def cpu_flags() -> frozenset[str]:
    """Give the processor's feature flags, or none where they cannot be read."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def cores() -> float:
    """Give the cores that this process may use: its affinity, or less where a container's quota says so."""
    available = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            return min(available, float(quota) / float(period))
    return available


def measure(cache: Path, threads: int, *, compiled: bool = False, seconds: float = 20.0) -> Iterator[dict[str, Any]]:
    """Measure in a process of its own what `auto` depends on, and yield what it says as it comes: rows, then the memo.

    Raises:
        MeasuringFailed: torch is missing or broken; the message is the last line of what went wrong.
    """
    command = [sys.executable, "-m", "worker.trainer.tune", "--cache", str(cache), "--threads", str(threads)]
    command += ["--seconds", str(seconds)]
    command += ["--compile"] if compiled else []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.terminate()  # harmless at its end; when nobody reads on, it shall not run on
        if process.wait() != 0:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            raise MeasuringFailed(said[-1] if said else f"it ended with {process.returncode}")


class MeasuringFailed(Exception):
    """Nothing was measured."""


def driver_gpus() -> list[str]:
    """Give the GPUs that the NVIDIA driver sees, whether or not torch can use them."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
