"""The walk-through of the README, executed word for word against a real stack."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import readme
from tests.system.up import running

pytestmark = pytest.mark.system


def walkthrough() -> str:
    """Give the shell blocks of the walk-through, in order."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", readme.part("walkthrough"), re.DOTALL | re.MULTILINE))


def test_the_walkthrough_ends_with_the_weights(tmp_path: Path) -> None:
    script = walkthrough()
    assert script.count("/v1/jobs") >= 4
    with running(tmp_path / "home") as stack:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            check=False, env=os.environ | {"TUNEYARD_URL": stack.url, "TUNEYARD_HOME": str(stack.home)},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ready\n")
    assert "event: done" in done.stdout
    assert "'test/accuracy'" in done.stdout
    assert "'duplicates/leaking_pairs'" in done.stdout
    assert (tmp_path / "outliers.png").read_bytes().startswith(b"\x89PNG")
    pairs = pq.read_table(tmp_path / "duplicates.parquet")
    assert {"first_sample", "second_split", "similarity", "exact"} <= set(pairs.column_names)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert {"model.safetensors", "config.json", "README.md", "metrics.json"} <= set(archive.namelist())
