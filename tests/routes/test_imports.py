"""The API process stays light: what it does not need at rest is not loaded."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.routes

HEAVY = (
    "torch",
    "torchvision",
    "numpy",
    "pyarrow",
    "celery",
    "kombu",
    "redis",
    "alembic",
    "obstore",
    "sklearn",
    "worker",
)


def test_importing_the_application_loads_nothing_heavy() -> None:
    code = f"import app.main, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
