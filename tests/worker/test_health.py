"""The sign of life: there, fresh, old."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from worker import health

pytestmark = pytest.mark.unit


def ask(home: Path) -> "subprocess.CompletedProcess[str]":
    script = "import runpy, sys; runpy.run_module('worker.health', run_name='__main__')"
    environment = os.environ | {"TUNEYARD_HOME": str(home)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_a_worker_is_healthy_while_its_sign_is_fresh(tmp_path: Path) -> None:
    assert ask(tmp_path).returncode == 1
    health.show(tmp_path)
    assert ask(tmp_path).returncode == 0
    old = time.time() - 2 * health.SILENT_SECONDS
    os.utime(health.sign_of_life(tmp_path), (old, old))
    answer = ask(tmp_path)
    assert answer.returncode == 1
    assert re.search(r"12\d seconds ago", answer.stdout)


def test_asking_is_cheap() -> None:
    script = "import sys, worker.health; print(len({'celery', 'sqlalchemy', 'pydantic', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "0\n"
