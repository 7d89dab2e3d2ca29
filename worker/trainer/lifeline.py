"""How a child process ends with its parent. Standard library only."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; only Linux does. A parent that is dead is not noticed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def exit_if_orphan(parent: int) -> None:
    """End at once if `parent`, whose child this process was born as, is gone."""
    if os.getppid() != parent:
        os._exit(75)
