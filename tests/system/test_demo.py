"""The demonstration, whole."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.up import TUNEYARD, environment

pytestmark = [pytest.mark.system, pytest.mark.long]


def test_pretraining_pays_and_the_weights_load_without_this_project(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TUNEYARD, "demo", "--out", "out", "--json"], env=environment(tmp_path), cwd=tmp_path, capture_output=True,
        text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    means = {start: statistics.fmean(values) for start, values in made["test_accuracy"].items()}
    assert means["pretrained"] > means["scratch"]
    assert {len(values) for values in made["test_accuracy"].values()} == {3}
    assert made["raw_pixels"]["all_labels"] > statistics.fmean(made["raw_pixels"]["few_labels"])

    folder = Path(made["weights"][0]).parent
    # Isolated, so that this project is not importable.
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", made["load"]], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    left = subprocess.run(["pgrep", "-f", "tuneyard-demo-"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
