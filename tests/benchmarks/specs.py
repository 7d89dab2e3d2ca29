"""What our side is told to train: the bodies of the jobs that several workloads share."""

from typing import Any

from tests.benchmarks.pairs import Bench, Numbers

NEVER = 1_000_000
SGD: Numbers = {"learning_rate": 0.05, "optimizer": {"name": "sgd"}, "weight_decay": 5e-4}


def fine_tune(
    bench: Bench, architecture: Any, *, trainable: str = "all", augmentation: str = "standard", **training: Any
) -> Numbers:
    """Give a fine-tune that validates nothing and saves its first checkpoint when it is over."""
    return {
        "recipe": "image_classification", "model": architecture, "data": {"validation_fraction": 0.0},
        "params": {"trainable": trainable, "augmentation": augmentation},
        "training": {"seed": bench.seed, "checkpoint_every": NEVER, **training},
    }  # fmt: skip
