"""The two sides of a pair, each a process of its own: ours as `tuneyard run` starts it, the other as naive.py."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]


def ours(spec: Numbers, folder: Path, cache: Path, *, threads: int = 0, warmup: int = 3) -> Numbers:
    """Train from a spec; give `{samples_per_second, seconds, accuracy, knn, first_step, metrics, result, events}`.

    The rate counts from the first report after `warmup` steps to the last one, so neither ingest nor decoding is in it;
    `seconds` is the training alone, from the plan to the last word.
    """
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "spec.json"
        path.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "worker.trainer", "run", str(path), "--data", str(folder), "--out", work,
                   "--cache", str(cache), "--threads", str(threads or os.cpu_count() or 1)]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [(time.perf_counter(), json.loads(line)) for line in process.stdout]
    return _summary(lines, warmup)


def _summary(lines: list[tuple[float, Numbers]], warmup: int) -> Numbers:
    kinds: dict[str, list[tuple[float, Numbers]]] = {}
    for at, line in lines:
        kinds.setdefault(line["type"], []).append((at, line))
    if "failed" in kinds:
        raise RuntimeError(f"our side failed: {kinds['failed'][0][1]['error']}")
    (ended, last), (planned, plan) = kinds["finished"][0], kinds["planned"][0]
    batch = plan["plan"]["batch_size"]
    steps = [(at, line["step"]) for at, line in kinds["progress"] if line["phase"] == "train" and line["step"]]
    steps = [point for point in steps if point[1] >= warmup] or steps
    (begun, first), (over, final) = steps[0], steps[-1]
    metrics = last["metrics"]
    return {
        "samples_per_second": (final - first) * batch / (over - begun) if over > begun else None,
        "seconds": ended - planned,
        "accuracy": metrics.get("test/accuracy"),
        "knn": metrics.get("probe/knn_accuracy"),
        "metrics": metrics,
        "result": last["result"],
        "plan": plan["plan"],
        "events": {line["code"]: (at - planned, line) for at, line in kinds.get("event", ())},
        "epochs_at": [at - planned for at, line in kinds.get("metrics", ()) if _ends_epoch(line)],
    }


def _ends_epoch(line: Numbers) -> bool:
    return any(name.startswith(("validation/", "probe/")) for name, _step, _value in line["rows"])


def naive(asked: Numbers) -> Numbers:
    """Run one workload of naive.py."""
    command = [sys.executable, "-m", "tests.benchmarks.naive", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
