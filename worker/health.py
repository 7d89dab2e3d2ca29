"""`python -m worker.health`: exit 0 while the worker of this host lives. Standard library only: it is asked often.

The sign of life is a file below the home and not a row, because an outage of the database is no reason to restart a
worker that sits it out.
"""

import os
import socket
import sys
import time
from pathlib import Path

SILENT_SECONDS = 60.0


def sign_of_life(home: Path) -> Path:
    """Give the file that a worker touches; workers of several hosts may share one home."""
    return home / "run" / f"{socket.gethostname()}.alive"


def show(home: Path) -> None:
    """Say that this worker lives."""
    path = sign_of_life(home)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch()


def main() -> int:
    """Say whether a worker of this host was heard lately."""
    path = sign_of_life(Path(os.environ.get("TUNEYARD_HOME", "~/.tuneyard")).expanduser())
    try:
        silent = time.time() - path.stat().st_mtime
    except OSError:
        print(f"no worker was ever heard here ({path})")
        return 1
    print(f"the worker was heard {silent:.0f} seconds ago")
    return 0 if silent < SILENT_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
