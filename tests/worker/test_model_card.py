"""The two blocks of a model card, pasted into an interpreter without this project, give what the job reported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from app.domain.datasets import DatasetFacts
from app.domain.models import ModelConfig
from app.domain.spec import Architecture
from tests.worker import sets
from worker.parts.backbones import build_backbone
from worker.report import BaseModelInput

pytestmark = pytest.mark.worker

PASTED = """
import json, os, shutil, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [entry for entry in sys.path if os.path.realpath(entry or ".") != sys.argv[1]]
assert not any(os.path.exists(os.path.join(entry, "worker", "recipe.py")) for entry in sys.path)
load, feed = (open(name).read() for name in ("load.py", "feed.py"))
names = {}
exec(load, names)
answers = []
for number in range(int(sys.argv[2])):
    shutil.copy(f"images/{number}.png", "image.png")
    exec(feed, names)
    answers.append(names["output"].argmax(1).item())
json.dump(answers, open("answers.json", "w"))
"""


def paste(folder: Path, count: int) -> list[int]:
    load, feed = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    (folder / "load.py").write_text(load)
    (folder / "feed.py").write_text(feed)
    run = subprocess.run(
        [sys.executable, "-I", "-c", PASTED, os.path.realpath("."), str(count)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "answers.json").read_text())


def write_images(facts: DatasetFacts, split: str, folder: Path) -> list[int]:
    folder.mkdir()
    labels: list[int] = []
    for shard in (shard for shard in facts.shards if shard.split == split):
        table = pa.ipc.open_stream(pa.memory_map(str(shard.path))).read_all()
        for row in table.to_pylist():
            (folder / f"{len(labels)}.png").write_bytes(row["image"]["bytes"])
            labels.append(row["label"])
    return labels


# A plain torchvision network that resizes what it is fed, and a small one with a hidden head.
JOBS: dict[str, dict[str, Any]] = {
    "shufflenet_v2_x0_5": {"model": {"architecture": "shufflenet_v2_x0_5", "image_size": 32}},
    "small_cnn": {
        "model": {"architecture": "small_cnn", "width": 0.25, "whitening": True},
        "params": {"head": {"hidden": 32, "dropout": 0.1}, "ema": 0.8},
    },
}


@pytest.mark.parametrize("name", JOBS)
def test_pasted_lines_reach_the_reported_accuracy(name: str, digits: DatasetFacts, tmp_path: Path) -> None:
    job = sets.spec(**JOBS[name], training={"epochs": 12, "precision": "float32", "learning_rate": 3e-3})
    order = sets.order(job, digits, tmp_path)
    _, last = sets.finished(order)
    assert last.metrics["test/accuracy"] is not None
    folder = Path(order.scratch) / "model"
    labels = write_images(digits, "test", folder / "images")
    answers = paste(folder, len(labels))
    accuracy = sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels)
    assert accuracy == pytest.approx(last.metrics["test/accuracy"], abs=0.001)
    assert accuracy > 0.3, "chance is 0.1"


def test_a_fine_tune_starts_from_the_backbone_of_a_model(digits: DatasetFacts, tmp_path: Path) -> None:
    first = sets.order(sets.spec(), digits, tmp_path / "first")
    _, made = sets.finished(first)
    assert made.model is not None
    weights = Path(first.scratch) / "model" / "model.safetensors"
    base = BaseModelInput(id="mdl_base", config=made.model.config, weights=str(weights))
    job = sets.spec(params={"trainable": "head"}, training={"epochs": 1})
    second = sets.order({**job, "model": "mdl_" + "0" * 26}, digits, tmp_path / "second", model=base)
    sets.finished(second)
    before, after = load_file(weights), load_file(Path(second.scratch) / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    # Frozen in full, running statistics included; only the head is new.
    assert {key.split(".")[0] for key, value in before.items() if not value.equal(after[key])} == {"head"}


def test_the_published_config_builds_the_network_again(digits: DatasetFacts, tmp_path: Path) -> None:
    order = sets.order(sets.spec(), digits, tmp_path)
    sets.finished(order)
    config = ModelConfig.model_validate_json((Path(order.scratch) / "model" / "config.json").read_text())
    Architecture.model_validate(config.architecture)
    backbone = build_backbone(config.architecture, channels=config.channels, image_size=config.image_size, seed=0)
    state = load_file(Path(order.scratch) / "model" / "model.safetensors")
    assert set(backbone.state_dict()) == {key for key in state if not key.startswith("head.")}
