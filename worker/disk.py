"""Disks: when one is full, as the many ways to write say it, how much is how much, and what outlasts a power cut.

Torch-free.
"""

import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException) -> bool:
    """Say whether a write failed because the disk, a quota or a limit on files left no room."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)  # safetensors gives the system's message only as text
    return any(f"os error {code}" in text for code in _FULL) or "StorageFull" in text


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def amount(count: float) -> str:
    """Give bytes in decimal units, as disks are sold: `1.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
