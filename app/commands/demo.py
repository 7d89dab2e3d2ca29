"""`tuneyard demo`: does unsupervised pretraining pay when there are ten labels per class? Measured, not claimed.

Everything goes through the HTTP API of a stack of its own, as a user would do it. Only the raw-pixel baseline is
computed here, with scikit-learn.
"""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.syntax import Syntax

from app.client import Client
from app.commands import tables, units
from app.commands.bars import JobBoard
from app.commands.call import Exit, JsonOption, Output
from app.commands.watching import watch
from app.local import bind_to_parent, cores

LABELS = 10
SEEDS = (0, 1, 2)
NETWORK = {"architecture": "small_cnn", "width": 0.5}
PRETRAINING = {
    "recipe": "simclr",
    "training": {"epochs": 60, "batch_size": 256, "learning_rate": 4e-3, "checkpoint_every": 100},
}
# The same for both starts: a fixed number of steps, no validation, no early stopping. The rate is one that suits the
# start from scratch: of 1e-3, 2e-3 and 3e-3 the higher ones were better for it, the lowest for the pretrained start.
FINE_TUNING = {
    "recipe": "image_classification",
    "params": {"trainable": "all", "augmentation": "standard"},
    "training": {
        "epochs": 40,
        "batch_size": 20,
        "learning_rate": 2e-3,
        "early_stopping": None,
        "checkpoint_every": 100,
    },
    "data": {"labels_per_class": LABELS, "validation_fraction": 0.0},
}
_DRAWS = 20  # of ten labels per class, for the baseline


def demo(
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = Path("tuneyard-demo"),
    as_json: JsonOption = False,
) -> None:
    """Pretrain on digits without their labels, fine-tune with ten labels per class, compare with starting from scratch.

    Starts a stack of its own in a temporary home and ends it again; takes one to two minutes on two cores.
    """
    output = Output(as_json=as_json)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="tuneyard-demo-") as home,
        stack(Path(home), output) as url,
        Client(url, home=home) as client,
    ):
        made = measure(client, output, out)
    made["seconds"] = round(time.monotonic() - began, 1)
    output.answer(made, lambda: show(made))


@contextmanager
def stack(home: Path, output: Output) -> Iterator[str]:
    """Run `tuneyard up` on a fresh home and a free port, as a user would; gives its address."""
    output.tell(f"starting a stack in {home}")
    command = [sys.executable, "-m", "app.cli", "up", "--home", str(home), "--port", "0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNEYARD_")}
    # One thread per job and a job per core: many small jobs, and the same bits on every machine of a kind.
    kept |= {"TUNEYARD_THREADS": "1", "TUNEYARD_SLOTS": str(max(1, min(int(cores()), 4)))}
    news = home / "news"
    with news.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=kept, start_new_session=True,
            preexec_fn=bind_to_parent(os.getpid()),
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("ready "):
            process.wait()
            output.error(f"The stack did not start:\n{news.read_text().strip()}")
            raise typer.Exit(Exit.FAILURE)
        yield line.split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        process.stdout.close()


def measure(client: Client, output: Output, out: Path) -> dict[str, Any]:
    """Run the jobs, download the weights, and give the figures."""
    dataset = client.datasets.create("digits", builtin="digits")["id"]
    digits = client.datasets.wait(dataset)
    if digits["status"] != "ready":
        output.error(f"The digits could not be read: {digits['error']}")
        raise typer.Exit(Exit.FAILURE)
    output.tell(
        f"{digits['samples']:,} digits: {digits['splits']['train']:,} to train on, {digits['splits']['test']} to test"
    )
    pretraining, tunings = submit(client, dataset)
    with JobBoard(output.news) as board:
        ended = watch(client, board, [pretraining, *(job for jobs in tunings.values() for job in jobs)])
    by_id = {job["id"]: job for job in ended}
    for job in ended:
        if job["status"] != "succeeded":
            output.error(f"{job['name']} is {job['status']}", job["error"])
            raise typer.Exit(Exit.JOB_FAILED)
    accuracies = {start: [by_id[job]["metrics"]["test/accuracy"] for job in jobs] for start, jobs in tunings.items()}
    model = by_id[tunings["pretrained"][0]]["model"]
    weights = client.models.download(model, out / "classifier")
    backbone = client.models.download(by_id[pretraining]["model"], out / "backbone")
    return {
        "labels_per_class": LABELS,
        "seeds": list(SEEDS),
        "test_samples": digits["splits"]["test"],
        "test_accuracy": accuracies,
        "raw_pixels": baseline(client, dataset),
        "spec": {"model": NETWORK, "pretraining": PRETRAINING, "fine_tuning": FINE_TUNING},
        "weights": [str(path.resolve()) for path in [*weights, *backbone] if path.suffix == ".safetensors"],
        "load": snippet((out / "classifier" / "README.md").read_text()),
    }


def submit(client: Client, dataset: str) -> tuple[str, dict[str, list[str]]]:
    """Queue everything at once: the fine-tunings that start from the pretraining wait for its model by themselves."""
    common = {"dataset": dataset}
    pretraining = client.jobs.submit({**PRETRAINING, **common, "model": NETWORK, "name": "pretrain"})["id"]
    tunings: dict[str, list[str]] = {}
    for start, model in (("scratch", NETWORK), ("pretrained", pretraining)):
        tunings[start] = [
            client.jobs.submit(
                {
                    **FINE_TUNING, **common, "model": model, "name": f"{start}-{seed}",
                    "training": {**FINE_TUNING["training"], "seed": seed},
                }
            )["id"]
            for seed in SEEDS
        ]  # fmt: skip
    return pretraining, tunings


def baseline(client: Client, dataset: str) -> dict[str, Any]:
    """Measure the nearest neighbour on raw pixels, with all labels and with ten per class, over several draws."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    pixels = np.asarray(load_digits(return_X_y=True)[0])
    rows = {split: [_row(sample) for sample in samples_of(client, dataset, split)] for split in ("train", "test")}
    (train, known), (test, asked) = (np.array(rows[split]).T for split in ("train", "test"))

    def accuracy(chosen: Any) -> float:
        nearest = KNeighborsClassifier(1).fit(pixels[train[chosen]], known[chosen])
        return float(nearest.score(pixels[test], asked))

    draws: list[float] = []
    for seed in range(_DRAWS):
        order = np.random.default_rng(seed).permutation(len(train))
        draws.append(accuracy(np.concatenate([order[known[order] == label][:LABELS] for label in np.unique(known)])))
    return {"all_labels": accuracy(np.arange(len(train))), "few_labels": draws}


def samples_of(client: Client, dataset: str, split: str) -> Iterator[Any]:
    """Give every row of a split."""
    after = None
    while True:
        page = client.datasets.samples(dataset, split=split, limit=1000, after=after)
        yield from page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            return


def _row(sample: Any) -> tuple[int, int]:
    """Give which of scikit-learn's digits a sample is, from its path, and its label."""
    return int(Path(sample["path"]).stem), sample["label"]


def snippet(card: str) -> str:
    """Give the lines of a model card that load the weights."""
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    return found[1] if found else ""


def show(made: Any) -> RenderableType:
    """Give the comparison as a table, where the weights are, and how they are loaded."""
    raw, few = made["raw_pixels"], made["test_accuracy"]
    count, labels = len(made["seeds"]), f"{made['labels_per_class']} per class"
    rows = [
        ["nearest neighbour on raw pixels", "all", _percent([raw["all_labels"]]), "1"],
        ["nearest neighbour on raw pixels", labels, _percent(raw["few_labels"]), str(len(raw["few_labels"]))],
        ["small network from scratch", labels, _percent(few["scratch"]), str(count)],
        ["[bold]the same, pretrained without labels[/]", labels, f"[bold]{_percent(few['pretrained'])}[/]", str(count)],
    ]
    gain = 100 * (statistics.fmean(few["pretrained"]) - statistics.fmean(few["scratch"]))
    verdict = f"Pretraining {'gained' if gain > 0 else 'cost'} {abs(gain):.1f} points of test accuracy."
    return Group(
        tables.listing(["digits, test accuracy", "labels", "mean ± deviation", "runs"], rows, numbers=["runs"]),
        verdict,
        f"All of it took {units.duration(made['seconds'])}. The weights:",
        *(f"  {path}" for path in made["weights"]),
        "This loads the classifier (run it in its folder):\n",
        Syntax(made["load"], "python", background_color="default"),
    )


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f} %{spread}"
