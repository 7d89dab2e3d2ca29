"""A whole worker process, only with the fake trainer: `python -m tests.system.worker`."""

import sys

from app.settings import Settings
from tests.fakes import COMMAND
from worker.main import serve

if __name__ == "__main__":
    sys.exit(serve(Settings(), command=COMMAND))  # pyright: ignore[reportCallIssue]
