"""A trainer without torch that speaks the real wire, and goes wrong on demand: for fast tests of the supervisor.

Its "training" is a chain of digests, so that the weights of a resumed run equal those of an uninterrupted one exactly
when the supervisor handed over the right checkpoint. `spec["params"]["fake"]` says how long it runs and how it fails.
As a program it is a zygote: `python -m tests.fakes <descriptor>`. CUDA_FAKE_CARDS names the GPUs of its host.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from app.domain.errors import Failure
from app.domain.models import ModelConfig
from worker.report import (
    Failed,
    Finished,
    MadeFile,
    MadeModel,
    Metrics,
    Order,
    Outcome,
    Progress,
    Reporter,
    Saved,
)  # fmt: skip
from worker.trainer import zygote

COMMAND = (sys.executable, "-m", "tests.fakes")
HOLD_SECONDS = 120.0  # longer than any test waits for one thing, so that a hold does not end before the test asks


class Fake(BaseModel):
    """How the fake trainer behaves. A fault with a step happens in attempts up to `faulty_attempts`."""

    model_config = ConfigDict(extra="forbid")

    steps: int = 10
    step_seconds: float = 0.0
    checkpoint_every: int = 5
    faulty_attempts: int = 1
    kill_at: int | None = None  # SIGKILL to itself
    signal: int = signal.SIGKILL
    exit_at: int | None = None
    exit_code: int = 3
    hang_at: int | None = None
    hold_at: int | None = None  # after so many steps it waits until something else than to run is wanted
    garbage_at: int | None = None
    fail_at: int | None = None
    failure: dict[str, Any] | None = None
    silent_end: bool = False  # exits with 0 and says nothing
    deaf: bool = False  # does not do what is wanted
    output_bytes: int = 0
    child_seconds: float = 0.0  # leaves a child of its own behind
    escape: bool = False  # names a file outside scratch
    metrics_per_step: int = 1
    save_bytes: int = 0
    children: int = 0  # it orchestrates so many, each a fake of two steps, in rounds of two
    failing_child: int | None = None


def published() -> dict[str, list[dict[str, Any]]]:
    """Give a catalogue as worker.catalogue does; the recipe `fake` takes any parameters."""
    from tests.factories import ARCHITECTURES, RECIPES

    fake = {**RECIPES[0], "name": "fake", "requires": {}, "defaults": {}, "schema": {"type": "object"}}
    return {
        "recipes": [fake, *(dict(recipe) for recipe in RECIPES)],
        "architectures": [{"name": name, "facts": facts} for name, facts in ARCHITECTURES.items()],
    }


def digest_after(steps: int, seed: int = 0) -> str:
    """Give the digest that `steps` steps lead to: what the weights hold in the end."""
    state = str(seed)
    for step in range(steps):
        state = _next(state, step)
    return state


def _next(state: str, step: int) -> str:
    return hashlib.sha256(f"{state} {step}".encode()).hexdigest()


def main(order_path: str, connection: socket.socket) -> int:
    """Run an order."""
    order = Order.model_validate_json(Path(order_path).read_text())
    reporter = Reporter(connection, silence_seconds=order.silence_seconds)
    fake = Fake.model_validate(order.spec.get("params", {}).get("fake", {}))
    faulty = order.attempt <= fake.faulty_attempts
    seed = order.spec.get("training", {}).get("seed", 0)
    step, state = 0, str(seed)
    if order.checkpoint is not None:
        saved = json.loads(Path(order.checkpoint).read_text())
        step, state = saved["step"], saved["state"]
    if faulty and fake.child_seconds:
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({fake.child_seconds})"])
    if fake.output_bytes:
        print("x" * fake.output_bytes, flush=True)
    reporter.planned(
        order.plan or {"threads": order.threads, "made_in_attempt": order.attempt}, {"machine": "fake"}, exact=True
    )
    reporter.event(
        "trainer.began", f"Begins at step {step}.", step=step, environment=sorted(os.environ),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )  # fmt: skip
    if fake.children:
        if faulty:
            _go_wrong(fake, len(order.children), reporter, connection)
        reporter.send(_orchestrated(fake, order))
        return 0
    outcome: Outcome = "succeeded"
    while step < fake.steps:
        if faulty:
            _go_wrong(fake, step, reporter, connection)
        state, step = _next(state, step), step + 1
        time.sleep(fake.step_seconds)
        rows = tuple(
            (f"train/metric{index}" if index else "train/loss", step, 1.0 / step)
            for index in range(fake.metrics_per_step)
        )
        reporter.send(Metrics(rows=rows))
        reporter.send(Progress(phase="train", fraction=step / fake.steps, step=step, steps=fake.steps))
        if faulty and step == fake.hold_at:
            _hold(fake, reporter)
        wanted = "run" if fake.deaf else reporter.wanted
        if wanted == "cancel":
            reporter.send(Finished(outcome="cancelled"))
            return 0
        if wanted != "run" or (step % fake.checkpoint_every == 0 and step < fake.steps):
            _save(order, reporter, step, state, fake.save_bytes)
        if wanted != "run":
            outcome = cast("Outcome", {"pause": "paused", "drain": "drained", "stop": "stopped"}[wanted])
            break
    if faulty and fake.silent_end:
        return 0
    model = _model(order, state) if outcome in ("succeeded", "stopped") else None
    files = (MadeFile(name="table.json", file="table.json", media_type="application/json"),) if model else ()
    if model:
        (Path(order.scratch) / "table.json").write_text("[]")
    if fake.escape:
        files = (MadeFile(name="passwd", file="../../../../../../etc/passwd", media_type="text/plain"),)
    reporter.send(
        Finished(
            outcome=outcome, result={"steps": step}, metrics={"train/loss": 1.0 / max(step, 1)}, model=model,
            best={"metric": "train/loss", "value": 1.0 / max(step, 1), "step": step}, files=files,
        )
    )  # fmt: skip
    return 0


def _orchestrated(fake: Fake, order: Order) -> Finished:
    known = len(order.children)
    wanted = range(min(known // 2 * 2 + 2, fake.children))  # the whole of it every time: the store knows whom it has
    failing = {"fail_at": 0, "failure": {"fault": "user", "code": "test", "message": "It failed."}}
    bodies = tuple(
        {
            "child_key": str(number), "recipe": "fake", "dataset": order.spec["dataset"],
            "model": {"architecture": "small_cnn"},
            "params": {"fake": {"steps": 2, **(failing if number == fake.failing_child else {})}},
        }
        for number in wanted
    )  # fmt: skip
    if known < fake.children and not order.stopping:
        return Finished(outcome="children", children=bodies)
    outcome: Outcome = "stopped" if order.stopping else "succeeded"
    return Finished(outcome=outcome, result={child["key"]: child["status"] for child in order.children})


def _go_wrong(fake: Fake, step: int, reporter: Reporter, connection: socket.socket) -> None:
    if step == fake.kill_at:
        os.kill(os.getpid(), fake.signal)
        time.sleep(10)
    if step == fake.exit_at:
        print("about to exit", flush=True)
        os._exit(fake.exit_code)
    if step == fake.hang_at:
        time.sleep(3600)
    if step == fake.garbage_at:
        connection.sendall(b'{"type": "nonsense"}\n')
        time.sleep(3600)
    if step == fake.fail_at:
        reporter.send(Failed(error=Failure.model_validate(fake.failure)))
        os._exit(0)


def _hold(fake: Fake, reporter: Reporter) -> None:
    """Be alive for as long as a test needs, however slow the machine is."""
    deadline = time.monotonic() + HOLD_SECONDS
    while (fake.deaf or reporter.wanted == "run") and time.monotonic() < deadline:
        time.sleep(0.01)


def _save(order: Order, reporter: Reporter, step: int, state: str, padding: int) -> None:
    path = Path(order.scratch) / f"checkpoint-{step}"
    path.write_text(json.dumps({"step": step, "state": state, "padding": " " * padding}))
    reporter.send(Saved(file=path.name, step=step, epoch=0, metrics={"train/loss": 1.0 / step}, best_step=None))


def _model(order: Order, state: str) -> MadeModel:
    scratch = Path(order.scratch)
    (scratch / "model.safetensors").write_text(state)
    (scratch / "config.json").write_text("{}")
    config = ModelConfig(
        architecture={"architecture": "small_cnn"}, task="image_classification", classes=("cat", "dog"), image_size=32,
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip
    files = tuple(
        MadeFile(name=name, file=name, media_type=media_type)
        for name, media_type in (("model.safetensors", "application/octet-stream"), ("config.json", "application/json"))
    )
    return MadeModel(config=config, parameters=1, metrics={"train/loss": 0.1}, files=files)


def run_backward() -> None:
    """Start a thread for every GPU in sight, as torch does in the first backward pass of a process."""
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_FAKE_CARDS", ""))
    for _ in filter(None, cards.split(",")):
        threading.Thread(target=time.sleep, args=(HOLD_SECONDS,), daemon=True).start()


if __name__ == "__main__":
    control = socket.socket(fileno=int(sys.argv[1]))
    run_backward()
    if "--device" in sys.argv:
        sys.exit(zygote.serve_once(control, main))
    sys.exit(zygote.serve(control, main, published()))
