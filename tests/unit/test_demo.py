"""What the demonstration shows of its figures."""

import io
from typing import Any

import pytest
from rich.console import Console

from app.commands import demo

pytestmark = pytest.mark.unit


def made(**accuracies: list[float]) -> dict[str, Any]:
    return {
        "labels_per_class": 10, "seeds": [0, 1, 2], "test_samples": 500, "seconds": 93.4,
        "test_accuracy": accuracies, "raw_pixels": {"all_labels": 0.976, "few_labels": [0.88, 0.9]},
        "weights": ["/out/classifier/model.safetensors"], "load": "import torch\nnetwork = torch.nn.Linear(1, 1)",
    }  # fmt: skip


def text_of(value: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(demo.show(value))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_means_spreads_and_runs_are_shown_as_they_are() -> None:
    text = text_of(made(scratch=[0.94, 0.95, 0.96], pretrained=[0.98, 0.97, 0.99]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "nearest neighbour on raw pixels all 97.6 % 1" in lines
    assert "nearest neighbour on raw pixels 10 per class 89.0 % ± 1.4 2" in lines
    assert "small network from scratch 10 per class 95.0 % ± 1.0 3" in lines
    assert "the same, pretrained without labels 10 per class 98.0 % ± 1.0 3" in lines
    assert "gained 3.0 points" in text
    assert "/out/classifier/model.safetensors" in text
    assert "network = torch.nn.Linear(1, 1)" in text


def test_a_loss_is_called_a_loss() -> None:
    assert "cost 2.0 points" in text_of(made(scratch=[0.95, 0.97], pretrained=[0.93, 0.95]))


def test_the_lines_that_load_the_weights_are_those_of_the_model_card() -> None:
    card = "# A\n\n## Load it\n\n```python\nimport torch\nx = 1\n```\n\n```python\nother\n```\n"
    assert demo.snippet(card) == "import torch\nx = 1"


def test_both_starts_get_the_same_budget() -> None:
    assert demo.FINE_TUNING["training"]["early_stopping"] is None
    assert demo.FINE_TUNING["data"] == {"labels_per_class": 10, "validation_fraction": 0.0}
    assert len(demo.SEEDS) >= 3
