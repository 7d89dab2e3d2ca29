"""What a container or a service manager leaves this process: the limits of its control groups. Torch-free."""

import contextlib
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def processors() -> float | None:
    """Give how many processors' time this process may use; None: there is no quota."""
    quotas = [line.split() for line in _limits("cpu.max")]
    return min((int(quota) / int(period) for quota, period in quotas if quota != "max"), default=None)


def memory_bytes() -> int | None:
    """Give the memory that the processes of this one's groups may use together; None: there is no limit."""
    limits = [*_limits("memory.max"), *_limits("memory.limit_in_bytes", controller="memory")]
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _limits(file: str, *, controller: str = "") -> list[str]:
    """Read a file of this process's group and of those around it: version 2, or a controller of version 1.

    A container may see nothing but its own group, as the root of all.
    """
    root = group = ROOT / controller
    with contextlib.suppress(OSError):
        for line in OWN.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)  # `0::/path` is version 2
            if controller in controllers.split(","):
                group = root / path.lstrip("/")
    found: list[str] = []
    for folder in (group, *group.parents):
        if folder.is_relative_to(root):
            with contextlib.suppress(OSError):
                found.append((folder / file).read_text(encoding="utf-8").strip())
    return found
