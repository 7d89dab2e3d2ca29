"""When a disk is full, as the many ways to write say it. Torch-free."""

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException) -> bool:
    """Say whether a write failed because the disk, a quota or a limit on files left no room."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)  # safetensors gives the system's message only as text
    return any(f"os error {code}" in text for code in _FULL) or "StorageFull" in text
