"""The files that decide what a job computes, and a digest of them. Torch-free: the supervisor uses it too."""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import app.domain
import worker


def files() -> Iterator[tuple[str, Path]]:
    """Give the name and the path of each, in one order on every host: all of the worker, and the rules of `app`."""
    for package in (worker, app.domain):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".json"):
                yield f"{package.__name__}/{path.relative_to(folder).as_posix()}", path


@cache
def digest() -> str:
    """Hash names and contents, once per process: what is on disk later on is not what this process runs."""
    found = hashlib.sha256()
    for name, path in files():
        with contextlib.suppress(OSError):
            text = path.read_bytes()
            found.update(f"{name} {len(text)}\n".encode())
            found.update(text)
    return found.hexdigest()[:16]
