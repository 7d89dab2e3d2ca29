"""Our side in a process of its own: what `tuneyard run` does, every line stamped with the time it was said.

`python -m tests.benchmarks.ours '{"spec": …, "folder": …, "out": …, "cache": …}'`. A folder, or `builtin:NAME`, is
ingested once and found again under the cache's `ingested`; `model` is the folder of an exported model to start from.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app.domain.datasets import DatasetFacts
from app.domain.models import ModelConfig
from worker import ingest
from worker.report import BaseModelInput, Message, Order, Reporter
from worker.trainer import zygote
from worker.trainer.assembly import Assembly, assemble
from worker.trainer.local import local_order
from worker.trainer.process import carry_out


def facts_of(folder: str, ingested: Path, threads: int) -> DatasetFacts:
    """Ingest a folder or a built-in set, or find what an earlier run made of it."""
    name, builtin = Path(folder).name.removeprefix("builtin:"), folder.startswith("builtin:")
    known = ingested / name / "facts.json"
    if not known.exists():
        known.parent.mkdir(parents=True, exist_ok=True)
        if builtin:
            made = ingest.ingest_builtin(name, known.parent, ingested, threads=threads)
        else:
            made = ingest.ingest_folder(folder, known.parent, threads=threads)
        known.write_text(made.facts.model_dump_json())
    return DatasetFacts.model_validate_json(known.read_text())


def say(message: Message) -> None:
    """Print one stamped line."""
    print(json.dumps({"at": time.perf_counter(), **message.model_dump(mode="json")}), flush=True)


def order_of(asked: dict[str, Any]) -> Order:
    """Make the order of a run."""
    threads = asked["threads"]
    facts = facts_of(asked["folder"], Path(asked["ingested"]), threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out, cache = Path(asked["out"]), Path(asked["cache"])
    order = local_order(asked["spec"], facts, out, cache, threads=threads, device=device)
    if not asked.get("model"):
        return order
    start = Path(asked["model"])
    config = ModelConfig.model_validate_json((start / "config.json").read_text())
    weights = str(start / "model.safetensors")
    return order.model_copy(update={"model": BaseModelInput(id=asked["spec"]["model"], config=config, weights=weights)})


def assembled(asked: dict[str, Any]) -> Assembly:
    """Make all that a run would train, and do not train it."""
    return assemble(order_of(asked), Reporter())


def main(asked: dict[str, Any]) -> int:
    """Train, warm as the service's trainers are; the first line has the moments before and after ingest."""
    zygote.prepare()
    begun = time.perf_counter()
    order = order_of(asked)
    print(json.dumps({"at": time.perf_counter(), "type": "begun", "before_ingest": begun}), flush=True)
    return carry_out(order, Reporter(listener=say))


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
