"""The preset `fast`, from the body to the weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from app.domain.spec import Optimizer
from tests.worker import sets
from worker.parts.tuning import Workload, learning_rate
from worker.report import Planned, Saved
from worker.trainer import alone
from worker.trainer.assembly import assemble

pytestmark = pytest.mark.worker


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> DatasetFacts:
    """Noisy coloured stripes, upright or level, thin or thick: 12 pixels a side."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, 360)
    rows = np.arange(12)
    waves = np.stack([np.sin(rows * (0.9 if thick else 2.2))[:, None] + np.zeros(12) for thick in (0, 1)])
    made = np.stack([waves[label % 2] if label < 2 else waves[label % 2].T for label in labels])
    noisy = made[..., None] * draws.uniform(30, 90, (360, 1, 1, 3)) + 128 + draws.normal(0, 30, (360, 12, 12, 3))
    pixels = noisy.clip(0, 255).astype(np.uint8)
    splits = {"train": (pixels[:256], labels[:256]), "test": (pixels[256:], labels[256:])}
    return sets.write_set(tmp_path_factory.mktemp("stripes"), splits, classes=4)


def job(**training: Any) -> dict[str, Any]:
    """Ask for the preset and a smaller network, and nothing else."""
    return {
        "recipe": "image_classification", "model": {"width": 0.125},
        "training": {"preset": "fast", "checkpoint_every": 1, **training},
    }  # fmt: skip


def test_a_run_of_it_learns_and_shows_what_it_came_to(stripes: DatasetFacts, tmp_path: Path) -> None:
    order = sets.order(job(), stripes, tmp_path)
    heard, last = sets.finished(order)
    plan = heard.of(Planned)[0].plan
    assert (plan["epochs"], plan["optimizer"]["name"]) == (5, "muon")
    assert plan["reasons"]["learning_rate"].startswith("0.03")
    assert last.model is not None
    assert last.model.config.architecture["whitening"] is True
    assert last.metrics["test/accuracy"] is not None
    assert last.metrics["test/accuracy"] > 0.7


def test_killed_and_resumed_it_ends_with_the_same_bits(stripes: DatasetFacts, tmp_path: Path) -> None:
    whole = sets.order(job(), stripes, tmp_path / "whole")
    heard, _ = sets.carry_out(whole)
    steps = heard.of(Saved)[-1].step
    for kill_at in (1, steps // 2 + 1, steps - 1):
        cut = sets.order(job(), stripes, tmp_path / f"cut-{kill_at}")
        checkpoint = sets.killed_at(kill_at, cut)
        resumed = sets.order(job(), stripes, tmp_path / f"resumed-{kill_at}", checkpoint=checkpoint)
        sets.carry_out(resumed)
        assert sets.weights_sha256(resumed) == sets.weights_sha256(whole)


def test_the_mirrors_of_a_run_follow_its_seed_and_its_epochs(stripes: DatasetFacts, tmp_path: Path) -> None:
    made = assemble(sets.order(job(seed=5), stripes, tmp_path), sets.Heard().reporter)
    assert made.info.seed == 5
    batches = [made.data.train.batch(made.data.train.labels[:3] * 0, epoch) for epoch in (0, 3)]
    assert [batch["epoch"].tolist() for batch in batches] == [[0] * 3, [3] * 3]


def test_another_recipe_says_that_it_has_none(stripes: DatasetFacts) -> None:
    with pytest.raises(UserFault, match="made for image_classification: leave it out for simclr"):
        alone.check({**job(), "recipe": "simclr", "model": {"architecture": "small_cnn"}}, stripes)


def test_its_rate_goes_with_the_batch_and_not_to_other_networks_or_optimisers() -> None:
    def rate(preset: str | None = "fast", optimizer: Any = "muon", batch: int = 256, **given: Any) -> float:
        work = Workload(**{"kind": "finetune", "family": "convolutional", "image_size": 32, "channels": 3,
                           "samples": 50_000, **given})  # fmt: skip
        return learning_rate(work, Optimizer(name=optimizer), batch, preset)[0]

    assert rate() == 0.03
    assert rate(batch=1024) == 0.06
    others: list[dict[str, Any]] = [{"optimizer": "adamw"}, {"family": "vit"}, {"pretrained": True}]
    assert rate(preset=None) < 0.01
    for given in others:
        assert rate(**given) == rate(preset=None, **given) < 0.01
