"""Both sides of a pair, each in a process of its own: ours.py, and one of the files of the other way."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.pairs import Bench, Numbers
from tests.benchmarks.specs import fine_tune

MODEL = "mdl_" + "0" * 26  # stands for the exported model that a run starts from
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ours(
    spec: Numbers, bench: Bench, folder: Path, *, cache: Path | None = None, model: Path | None = None,
    keep: Path | None = None, warmup: int = 3,
) -> Numbers:  # fmt: skip
    """Train from a spec; give rates, seconds and metrics, see `_summary`. `keep` is where the model shall go.

    The rate counts from the first report after `warmup` steps to the last one, so neither ingest nor decoding is in it.
    """
    with tempfile.TemporaryDirectory(dir=bench.work) as out:
        asked = {
            "spec": spec, "folder": str(folder), "out": out, "cache": str(cache or bench.cache), "threads": THREADS,
            "ingested": str(bench.work / "ingested"), "model": str(model) if model else None,
        }  # fmt: skip
        lines = run("ours", asked, timeout=600.0 + bench.budget)
        if keep is not None:
            shutil.copytree(Path(out) / "model", keep, dirs_exist_ok=True)
    return _summary(lines, warmup)


def trunk(bench: Bench, architecture: Numbers, **training: Any) -> Path:
    """Give the folder of a backbone that both sides start from, trained by ours for a short while, once."""
    kept = bench.work / f"trunk-{architecture['architecture']}-{architecture['image_size']}"
    if not kept.exists():
        spec = fine_tune(bench, architecture, augmentation="light", epochs=4, **training)
        ours(spec, bench, bench.part(4000), keep=kept)
    return kept


def run(module: str, asked: Numbers, timeout: float = 600.0) -> list[Numbers]:
    """Run a module of this folder on what is asked; give the lines of JSON that it printed."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", json.dumps(asked)]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, timeout=timeout,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        failed = [line["error"] for line in lines if line.get("type") == "failed"]
        if done.returncode or failed:
            errors.seek(0)
            said = failed or errors.read().splitlines()[-3:]
            raise RuntimeError(f"{module} ended with {done.returncode}: {said}")
    return lines


def naive(asked: Numbers) -> Numbers:
    """Run one workload of naive.py."""
    return run("naive", asked, timeout=600.0 + asked.get("seconds", 0.0))[-1]


def _summary(lines: list[Numbers], warmup: int) -> Numbers:
    kinds: dict[str, list[Numbers]] = {}
    for line in lines:
        kinds.setdefault(line["type"], []).append(line)
    begun, planned, last = kinds["begun"][0], kinds["planned"][0], kinds["finished"][0]
    plan = planned["plan"]
    steps = [(line["at"], line["step"]) for line in kinds["progress"] if line["phase"] == "train" and line["step"]]
    trained = steps[-1][0]
    steps = steps[:-1]  # the last report comes after the last checkpoint
    rows = [(line["at"], *row) for line in kinds.get("metrics", ()) for row in line["rows"]]
    per_epoch = plan["steps_per_epoch"]
    losses = [(step, value) for _at, name, step, value in rows if name == "train/loss"]
    steps += [(at, step) for at, name, step, _value in rows if name == "train/loss"]
    tail = [value for step, value in losses if step > losses[-1][0] - per_epoch]
    counted = sorted(point for point in steps if point[1] >= warmup)
    if not counted or counted[-1][1] == counted[0][1]:
        raise RuntimeError(f"{steps[-1][1]} steps were too few to count a rate from, after {warmup} that do not count")
    (first_at, first), (final_at, final) = counted[0], counted[-1]
    return {
        "samples_per_second": (final - first) * plan["batch_size"] / (final_at - first_at),
        "seconds": last["at"] - begun["at"],  # of the whole job: decoding, training, test, export
        "seconds_to_trained": trained - begun["at"],  # the last checkpoint included, the test and the export not
        "seconds_with_ingest": last["at"] - begun["before_ingest"],
        "seconds_from_plan": last["at"] - planned["at"],
        "accuracy": last["metrics"].get("test/accuracy"),
        "metrics": last["metrics"],
        "plan": plan,
        "last_epoch_loss": statistics.fmean(tail) if tail else None,
        "epoch_ends": _epoch_ends(kinds.get("metrics", []), begun["before_ingest"], begun["at"], per_epoch),
    }


def _epoch_ends(metrics: list[Numbers], before: float, after: float, per_epoch: int) -> list[Numbers]:
    """Give when each epoch was over, and the numbers that were reported then."""
    ends: dict[int, dict[str, Any]] = {}
    for line in metrics:
        for name, step, value in line["rows"]:
            if step and step % per_epoch == 0:
                end = ends.setdefault(step // per_epoch, {})
                if name == "train/loss":
                    end |= {"seconds": line["at"] - after, "seconds_with_ingest": line["at"] - before}
                if name.startswith("validation/"):
                    end["validated"] = line["at"] - before
                end[name] = value
    return [ends[epoch] for epoch in sorted(ends)]
