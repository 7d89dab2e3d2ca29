"""The service as real processes on this machine: Redis, the API and any number of workers, to be killed by tests."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis
from sqlalchemy import func, select, update

from app.local.redis import RedisConfig, find_redis
from app.settings import Settings
from app.store import tables
from app.store.blobs import open_blobs
from app.store.session import make_engine, transaction
from tests.factories import make_dataset
from tests.waiting import until

ROOT = Path(__file__).parents[2]
# Who asks often is quick; who gives up is patient, because a busy machine stalls for seconds.
TIMINGS = {
    "HEARTBEAT_SECONDS": "0.5", "FENCE_SECONDS": "9", "LEASE_SECONDS": "12", "POLL_SECONDS": "1",
    "SWEEP_SECONDS": "0.5", "DRAIN_SECONDS": "90",
}  # fmt: skip
FAKE = "tests.system.worker"
REAL = "worker.main"


class Worker:
    """A worker process with its zygote and trainers."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def trainers(self) -> list[int]:
        """Give the processes that train now: the zygote's children."""
        try:
            return [child.pid for zygote in psutil.Process(self.pid).children() for child in zygote.children()]
        except psutil.NoSuchProcess:
            return []

    def family(self) -> list[int]:
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system


class Stack:
    """Everything that runs; what a test killed is started again for the next one."""

    def __init__(self, home: Path, database_url: str) -> None:
        self.home, self.database_url = home, database_url
        (home / "logs").mkdir(parents=True)
        self.engine = make_engine(database_url, pool_size=5)
        self.blobs = open_blobs(Settings(home=home))  # pyright: ignore[reportCallIssue]
        self.key = "ty_" + secrets.token_urlsafe(32)
        self.listener = socket.create_server(("127.0.0.1", 0))  # ours, so that the API comes back on the same port
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.config = RedisConfig.for_home(home)
        self.redis: subprocess.Popen[bytes] | None = None
        self.api: subprocess.Popen[bytes] | None = None
        self.workers: list[Worker] = []
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)
        self._count = 0

    # Processes.

    def start_redis(self) -> None:
        program = find_redis()
        assert program is not None
        self.config.socket.unlink(missing_ok=True)
        self.redis = self._start("redis", [program, "-"], stdin=self.config.file)
        until(self.config.socket.exists)

    def start_api(self) -> None:
        self.listener.set_inheritable(True)
        self.api = self._start(
            "api",
            [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--fd", str(self.listener.fileno()),
             "--timeout-graceful-shutdown", "3", "--no-access-log"],
            keep=(self.listener.fileno(),),
        )  # fmt: skip
        until(self._answers, 120, "the API did not start")

    def start_worker(self, module: str = FAKE, **settings: str) -> Worker:
        """Start a worker and wait until it can run a job."""
        known = self._listed()
        worker = Worker(self._start("worker", [sys.executable, "-m", module], settings=settings))
        until(lambda: self._listed() - known, 120, "the worker did not become ready")
        self.workers.append(worker)
        return worker

    def stop_redis(self, number: int = signal.SIGKILL) -> None:
        if self.redis is not None:
            self.redis.send_signal(number)
            self.redis.wait(60)
            self.redis = None

    def flush_redis(self) -> None:
        """Empty Redis while everybody uses it."""
        with redis.Redis(unix_socket_path=str(self.config.socket), password=self.config.password) as client:
            client.flushall()

    def stop_worker(self, worker: Worker, number: int = signal.SIGKILL, timeout: float = 60) -> int:
        """Signal a worker, wait for its end, and give its exit code."""
        if worker in self.workers:
            self.workers.remove(worker)
        worker.process.send_signal(number)
        return worker.process.wait(timeout)

    def ensure(self, workers: int = 1) -> None:
        """Bring everything back that is missing, and end what is too much."""
        if self.redis is None or self.redis.poll() is not None:
            self.start_redis()
        if self.api is None or self.api.poll() is not None:
            self.start_api()
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            self.workers.remove(worker)
        while len(self.workers) > workers:
            self.stop_worker(self.workers[-1])
        while len(self.workers) < workers:
            self.start_worker()

    def freeze(self, pids: Iterable[int]) -> None:
        """Stop processes, none in the middle of a write: it would keep SQLite's lock, and everybody waiting."""
        with transaction(self.engine) as session:
            session.execute(update(tables.Job).where(tables.Job.id == "nobody's").values(name=""))  # takes that lock
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)

    def forget_jobs(self, *, running: bool = False) -> None:
        """Take what is left of earlier tests out of the queue, and with `running` from the workers, which end."""
        held = ("starting", "running") if running else ()
        while running and self.workers:
            self.stop_worker(self.workers[-1])
        with transaction(self.engine) as session:
            session.execute(
                update(tables.Job)
                .where(tables.Job.status.in_(("queued", "waiting", "paused", *held)))
                .values(status="cancelled", wanted="cancel")
            )

    def close(self) -> None:
        self.client.close()
        for worker in list(self.workers):
            self.stop_worker(worker)
        if self.api is not None:
            self.api.kill()
            self.api.wait()
        self.stop_redis()
        self.listener.close()
        self.engine.dispose()

    def log(self, name: str = "worker") -> str:
        """Give all that the processes of this name have logged."""
        return "\n".join(path.read_text() for path in sorted((self.home / "logs").glob(f"{name}-*.log")))

    # Jobs.

    def dataset(self) -> str:
        """Make a ready dataset without any bytes, for the fake trainer."""
        project = self.client.get("/v1/me").json()["project"]["id"]
        with transaction(self.engine) as session:
            row = session.get_one(tables.Project, project)
            return make_dataset(session, row).id

    def submit(self, *, seed: int = 0, dataset: str | None = None, **fake: Any) -> str:
        """POST a job for the fake trainer."""
        answer = self.client.post("/v1/jobs", json=self.body(seed=seed, dataset=dataset, **fake))
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def body(self, *, seed: int = 0, dataset: str | None = None, **fake: Any) -> dict[str, Any]:
        return {
            "recipe": "fake", "dataset": dataset or self.dataset(), "model": {"architecture": "small_cnn"},
            "params": {"fake": fake}, "training": {"seed": seed},
        }  # fmt: skip

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def verb(self, job_id: str, verb: str) -> None:
        answer = self.client.post(f"/v1/jobs/{job_id}/{verb}")
        assert answer.status_code == 202, answer.text

    def until_status(self, job_id: str, *wanted: str, seconds: float = 120) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def reached() -> bool:
            found.update(self.job(job_id))
            return found["status"] in wanted

        until(reached, seconds, f"{job_id} never became {wanted}")
        return found

    def until_step(self, job_id: str, step: int) -> None:
        """Wait until the job has reported a step, read from SQL because a test may have stopped the API."""
        query = select(tables.Metric.step).where(tables.Metric.job_id == job_id, tables.Metric.step >= step).limit(1)
        until(lambda: self._scalar(query), 120, f"{job_id} never reached step {step}")

    def last_step(self, job_id: str) -> int:
        """Give the newest step that the job has reported."""
        return self._scalar(select(func.max(tables.Metric.step)).where(tables.Metric.job_id == job_id))

    def expire(self, job_id: str) -> None:
        """Let the time of a job's lease run out at once, for a test whose point is not how long that takes."""
        with transaction(self.engine) as session:
            session.execute(update(tables.Job).where(tables.Job.id == job_id).values(lease_expires_at=1.0))

    def rows(self, table: Any, job_id: str, order: Any) -> list[Any]:
        with transaction(self.engine, read_only=True) as session:
            return list(session.scalars(select(table).where(table.job_id == job_id).order_by(order)))

    def attempts(self, job_id: str) -> list[tables.Attempt]:
        return self.rows(tables.Attempt, job_id, tables.Attempt.attempt)

    def events(self, job_id: str) -> list[tables.Event]:
        return self.rows(tables.Event, job_id, tables.Event.number)

    def weights(self, job_id: str) -> bytes:
        """Download the weights of the job's model."""
        model = self.job(job_id)["model"]
        answer = self.client.get(f"/v1/models/{model}/files/model.safetensors")
        assert answer.status_code == 200, answer.text
        return answer.content

    def assert_ended_once(self, job_id: str, status: str = "succeeded") -> None:
        """Check what must hold of any job, whatever happened to it."""
        assert self.job(job_id)["status"] == status
        events = self.events(job_id)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert [event.code for event in events if event.type == "done"] == [status]
        assert events[-1].type == "done"
        attempts = [event.attempt for event in events]
        assert attempts == sorted(attempts), "an earlier attempt wrote after a later one"
        assert all(attempt.closed_at is not None for attempt in self.attempts(job_id))
        with transaction(self.engine, read_only=True) as session:
            models = session.scalars(select(tables.Model).where(tables.Model.job_id == job_id)).all()
        assert len(models) == (1 if status in ("succeeded", "stopped") else 0)

    # Inside.

    def _start(
        self, name: str, command: list[str], *, stdin: bytes | None = None, keep: tuple[int, ...] = (),
        settings: dict[str, str] | None = None,
    ) -> "subprocess.Popen[bytes]":  # fmt: skip
        self._count += 1
        given = {
            "HOME": str(self.home), "DATABASE_URL": self.database_url, "REDIS_URL": self.config.url,
            "ADMIN_KEY": self.key, "FREE_SPACE_FLOOR_BYTES": "0", **TIMINGS, **(settings or {}),
        }  # fmt: skip
        environment = os.environ | {f"TUNEYARD_{key}": value for key, value in given.items() if value}
        with (self.home / "logs" / f"{name}-{self._count:03d}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=keep,
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            )  # fmt: skip
        if stdin is not None:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(stdin)
        return process

    def _answers(self) -> bool:
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def _listed(self) -> set[str]:
        with transaction(self.engine, read_only=True) as session:
            return set(session.scalars(select(tables.Worker.id)))

    def _scalar(self, query: Any) -> Any:
        with transaction(self.engine, read_only=True) as session:
            return session.scalar(query)
