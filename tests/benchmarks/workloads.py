"""What is measured: each workload runs one pair and says what it compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.sides import Numbers, naive, ours

SECONDS = 20.0  # of training per side, where a rate is compared


@dataclass(frozen=True)
class Bench:
    """Where the pictures are, and where ours may keep its cache."""

    folder: Path
    cache: Path
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """One measured pair; `quality` is None where only speed is compared."""

    ours: float
    other: float
    quality: tuple[float, float] | None = None


@dataclass(frozen=True)
class Workload:
    """One line of the table. `ratio` is ours / other for rates, other / ours for times: above 1 we are better."""

    name: str
    unit: str  # "samples/s" or "s"
    goal: float
    run: Callable[[Bench], Pair]


WORKLOADS: list[Workload] = []


def workload(name: str, unit: str, goal: float) -> Callable[[Callable[[Bench], Pair]], Callable[[Bench], Pair]]:
    """Enter a function into the table."""

    def enter(run: Callable[[Bench], Pair]) -> Callable[[Bench], Pair]:
        WORKLOADS.append(Workload(name, unit, goal, run))
        return run

    return enter


def _spec(recipe: str, architecture: Numbers, params: Numbers, training: Numbers, **more: Any) -> Numbers:
    return {"recipe": recipe, "model": architecture, "params": params, "training": training, **more}


def _rate(bench: Bench, architecture: Numbers, batch: int, seconds: float = SECONDS) -> Pair:
    training = {"epochs": 1000, "batch_size": batch, "learning_rate": 0.05, "optimizer": {"name": "sgd"},
                "max_seconds": seconds, "seed": bench.seed, "checkpoint_every": 1_000_000}  # fmt: skip
    spec = _spec("image_classification", architecture, {"trainable": "all", "augmentation": "standard"}, training)
    fast = ours(spec, bench.folder, bench.cache)
    asked = {**architecture, "workload": "classification", "folder": str(bench.folder), "batch_size": batch,
             "seconds": seconds, "seed": bench.seed}  # fmt: skip
    return Pair(fast["samples_per_second"], naive(asked)["samples_per_second"])


@workload("finetune_resnet18_32", "samples/s", 6)
def finetune_resnet18(bench: Bench) -> Pair:
    """Full fine-tune, torchvision stem, 32 px, standard augmentation."""
    return _rate(bench, {"architecture": "resnet18", "image_size": 32}, 128)


@workload("finetune_resnet18_small_stem_32", "samples/s", 1.9)
def finetune_small_stem(bench: Bench) -> Pair:
    """Full fine-tune, small stem, 32 px."""
    return _rate(bench, {"architecture": "resnet18", "image_size": 32, "stem": "small"}, 64, 40)


@workload("finetune_resnet50_224", "samples/s", 1.9)
def finetune_resnet50(bench: Bench) -> Pair:
    """Full fine-tune, 224 px."""
    return _rate(bench, {"architecture": "resnet50", "image_size": 224}, 16, 60)


def _frozen(bench: Bench, trainable: str, epochs: int) -> Pair:
    architecture = {"architecture": "resnet18", "image_size": 64}
    training = {"epochs": epochs, "batch_size": 128, "learning_rate": 0.05, "optimizer": {"name": "sgd"},
                "seed": bench.seed, "weight_decay": 5e-4, "checkpoint_every": 1_000_000}  # fmt: skip
    params = {"trainable": trainable, "augmentation": "none"}
    data = {"validation_fraction": 0.0}
    fast = ours(_spec("image_classification", architecture, params, training, data=data), bench.folder, bench.cache)
    asked = {**architecture, "workload": "classification", "folder": str(bench.folder), "batch_size": 128,
             "epochs": epochs, "trainable": trainable, "augmentation": "none", "seed": bench.seed,
             "evaluate": True}  # fmt: skip
    other = naive(asked)
    return Pair(fast["seconds"], other["seconds"], (fast["accuracy"], other["accuracy"]))


@workload("head_resnet18_64_10_epochs", "s", 25)
def head_only(bench: Bench) -> Pair:
    """Head only, 64 px, 10 epochs: the frozen network runs once, not in every epoch."""
    return _frozen(bench, "head", 10)


@workload("last1_resnet18_64_10_epochs", "s", 4)
def last_stage(bench: Bench) -> Pair:
    """`last:1`, 64 px, 10 epochs."""
    return _frozen(bench, "last:1", 10)


def _simclr(bench: Bench, architecture: Numbers, batch: int, seconds: float) -> Pair:
    training = {"epochs": 1000, "batch_size": batch, "max_seconds": seconds, "seed": bench.seed,
                "optimizer": {"name": "sgd"}, "learning_rate": 0.06, "checkpoint_every": 1_000_000}  # fmt: skip
    fast = ours(_spec("simclr", architecture, {}, training), bench.folder, bench.cache)
    asked = {**architecture, "workload": "simclr", "folder": str(bench.folder), "batch_size": batch,
             "seconds": seconds, "seed": bench.seed}  # fmt: skip
    return Pair(fast["samples_per_second"], naive(asked)["samples_per_second"])


@workload("simclr_small_cnn_32", "samples/s", 4)
def simclr_small(bench: Bench) -> Pair:
    """SimCLR against lightly's transform and loss in plain PyTorch."""
    return _simclr(bench, {"architecture": "small_cnn", "image_size": 32}, 128, 30)


@workload("simclr_resnet18_small_stem_32", "samples/s", 2.1)
def simclr_resnet(bench: Bench) -> Pair:
    """The same with ResNet-18 and the small stem."""
    return _simclr(bench, {"architecture": "resnet18", "image_size": 32, "stem": "small"}, 128, 60)
