"""Jobs that learn from labelled and unlabelled rows together."""

from pathlib import Path
from typing import Any

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.recipe import Progress
from worker.trainer.assembly import Assembly, assemble

START = Progress(0, 10, 0, 1)


def job(objective: str = "fixmatch", *, training: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    return sets.spec("semi_supervised", params={"objective": objective, **params}, training=training or {})


def made(facts: DatasetFacts, folder: Path, body: dict[str, Any]) -> Assembly:
    return assemble(sets.order(body, facts, folder), sets.Heard().reporter)
