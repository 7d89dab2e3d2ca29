"""A trained model for tests that use one: pretrained on real digits in a few seconds, once per session."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import save_file

from app.domain.datasets import DatasetFacts
from app.domain.models import ModelConfig
from tests.worker import sets
from worker.parts.networks import Network, assemble, state_dict
from worker.report import BaseModelInput, Finished, Order


def order(recipe: str, facts: DatasetFacts, folder: Path, base: BaseModelInput | None, **given: Any) -> Order:
    """Make the order of a job that uses a model."""
    return sets.order({"recipe": recipe, "model": MODEL, **given}, facts, folder, model=base)


def done(given: Order) -> Finished:
    """Run an order that must succeed, and check that it named what it wrote."""
    _, last = sets.finished(given)
    assert {path.name for path in Path(given.scratch).iterdir()} == {file.name for file in last.files}
    return last


def table(given: Order, name: str) -> Any:
    """Read a Parquet file of a job."""
    return pq.read_table(Path(given.scratch) / name)


def pretrained(folder: Path, *, rows: int = 600, epochs: int = 12) -> BaseModelInput:
    """Pretrain a narrow network on digits without their labels."""
    facts = sets.write_set(folder / "set", sets.digits(rows, 10))
    training = {"epochs": epochs, "batch_size": 100, "learning_rate": 0.004}
    order = sets.order({**sets.spec("simclr", training=training), "model": NETWORK}, facts, folder)
    _, last = sets.finished(order)
    assert last.model is not None
    weights = Path(order.scratch) / "model" / "model.safetensors"
    return BaseModelInput(id=MODEL, config=last.model.config, weights=str(weights))


def random(folder: Path, *, channels: int = 1, classes: tuple[str, ...] = ()) -> BaseModelInput:
    """Give a network at its random start as if it were a model."""
    config = ModelConfig(
        architecture=NETWORK, task="image_classification", classes=classes, image_size=8, channels=channels,
        mean=(0.5,) * channels, std=(0.3,) * channels,
    )  # fmt: skip
    network: Network = assemble(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict(network.backbone, network.head), folder / "model.safetensors")
    (folder / "config.json").write_text(config.model_dump_json())
    return BaseModelInput(id=MODEL, config=config, weights=str(folder / "model.safetensors"))


MODEL = "mdl_" + "a" * 26
NETWORK = {"architecture": "small_cnn", "width": 0.25, "image_size": 8}
