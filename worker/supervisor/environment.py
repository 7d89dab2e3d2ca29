"""The environment of a trainer."""

from pathlib import Path

# What a trainer may inherit. Everything else stays out, above all the addresses and keys of databases and brokers.
_NAMES = frozenset({"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "TERM", "LD_LIBRARY_PATH", "LD_PRELOAD"})
_PREFIXES = (
    "LC_",
    "PYTHON",
    "VIRTUAL_ENV",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH",
    "SSL_CERT",
)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def clean_environment(source: dict[str, str], cache: Path) -> dict[str, str]:
    """Give the environment of a trainer: what it needs to run and to download public weights, and no credentials."""
    kept = {
        name: value
        for name, value in source.items()
        if name in _NAMES or name.startswith(_PREFIXES) or name.lower() in _PROXIES
    }
    return kept | {
        "OPENBLAS_NUM_THREADS": "1",  # a second thread before the fork would hang every child
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator starts one at import
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not start CUDA in the zygote
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbers of nvidia-smi, by which GPUs are given out here
        # Read once, at the first matrix product on a GPU, which comes before any job: without it cuBLAS may not repeat.
        "CUBLAS_WORKSPACE_CONFIG": source.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        "PYTHONUNBUFFERED": "1",
        "TORCH_HOME": kept.get("TORCH_HOME", str(cache / "torch")),
        "TORCHINDUCTOR_CACHE_DIR": kept.get("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor")),
    }
