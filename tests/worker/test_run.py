"""One attempt at a job, with a fake trainer that goes wrong on demand: every end leads to the right state."""

import contextlib
import errno
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import OperationalError

import worker.supervisor.lease
import worker.supervisor.wire
from app.domain.jobs import Status
from app.settings import Settings
from app.store import attempts, children, claims, endings, jobs, recipes, tables
from app.store.blobs import Blobs, open_blobs
from app.store.session import make_engine, transaction
from tests import fakes
from tests.databases import Copy, template
from tests.factories import make_dataset, make_job, make_project
from tests.fakes import COMMAND, digest_after
from tests.waiting import dead, until
from worker.supervisor.run import Host, work
from worker.supervisor.slots import Slots
from worker.supervisor.warm import Warm

pytestmark = pytest.mark.worker


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    warm = Warm(cache=tmp_path_factory.mktemp("cache"), command=COMMAND)
    warm.refresh()
    assert warm.ready.wait(30)
    yield warm
    warm.close()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def copy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return template(
        request.param, tmp_path_factory.mktemp("databases"), lambda: request.getfixturevalue("postgres_server")
    )


@pytest.fixture
def engine(copy: Copy) -> Iterator[Engine]:
    engine = make_engine(copy(), pool_size=5)
    yield engine
    engine.dispose()


@pytest.fixture
def host(engine: Engine, tmp_path: Path, warm: Warm) -> Iterator[Host]:
    settings = Settings(
        home=tmp_path, heartbeat_seconds=0.3, fence_seconds=4, lease_seconds=6, progress_seconds=30, drain_seconds=5,
    )  # fmt: skip  # pyright: ignore[reportCallIssue]
    host = Host(
        settings=settings, engine=engine, blobs=open_blobs(settings), slots=Slots(1), warm=warm, worker="wrk_test",
        threads=1, announce=lambda _job, _internal: None,
    )  # fmt: skip
    yield host
    assert host.slots.busy == 0
    assert not host.runs
    assert not list((tmp_path / "scratch").glob("*/*"))


def submit(engine: Engine, *, columns: dict[str, Any] | None = None, **fake: Any) -> str:
    with transaction(engine) as session:
        spec = {"recipe": "image_classification", "params": {"fake": fake}}
        return make_job(session, make_project(session), spec=spec, **(columns or {})).id


def job_of(engine: Engine, job_id: str) -> tables.Job:
    with transaction(engine, read_only=True) as session:
        return session.get_one(tables.Job, job_id)


def rows_of(engine: Engine, table: Any, job_id: str, order: Any) -> list[Any]:
    with transaction(engine, read_only=True) as session:
        return list(session.scalars(select(table).where(table.job_id == job_id).order_by(order)))


def events_of(engine: Engine, job_id: str) -> list[tables.Event]:
    return rows_of(engine, tables.Event, job_id, tables.Event.number)


def attempts_of(engine: Engine, job_id: str) -> list[tables.Attempt]:
    return rows_of(engine, tables.Attempt, job_id, tables.Attempt.attempt)


def set_job(engine: Engine, job_id: str, **values: Any) -> None:
    with transaction(engine) as session:
        session.execute(update(tables.Job).where(tables.Job.id == job_id).values(**values))


def again(host: Host, job_id: str) -> None:
    """Run the next attempt now, whatever the back-off."""
    set_job(host.engine, job_id, not_before=0.0)
    assert work(host, "poll", internal=False) == 1


def weights_of(engine: Engine, blobs: Blobs, job_id: str) -> str:
    model = job_of(engine, job_id).model_id
    with transaction(engine, read_only=True) as session:
        row = session.get_one(tables.ModelFile, (model, "model.safetensors"))
    return b"".join(blobs.open(row.sha256)).decode()


@contextlib.contextmanager
def running(host: Host, job_id: str, step: int = 2) -> Iterator["Future[int]"]:
    """Run a job beside the test, from the moment on when its trainer has reported `step`."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, host, "message", internal=False)
        until(lambda: any(
            "train/loss" in event.data.get("metrics", {}) and event.data["metrics"]["train/loss"][0] >= step
            for event in events_of(host.engine, job_id)
        ))  # fmt: skip
        yield future
        future.result(30)


def trainer_of(host: Host, job_id: str) -> int:
    wire = host.runs[job_id]._wire
    assert wire is not None
    return wire._trainer.pid


def test_a_job_runs_from_the_claim_to_its_model(host: Host) -> None:
    job_id = submit(host.engine, steps=10)
    assert work(host, "message", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt, job.lease_owner) == (Status.SUCCEEDED, 1, None)
    assert job.plan == {"threads": 1, "made_in_attempt": 1}
    assert job.result == {"steps": 10}
    assert job.progress is not None
    assert job.progress["step"] == 10
    assert job.best == {"metric": "train/loss", "value": 0.1, "step": 10}
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(10)
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 11))
    assert [row.name for row in rows_of(host.engine, tables.JobFile, job_id, tables.JobFile.name)] == ["table.json"]
    (attempt,) = attempts_of(host.engine, job_id)
    assert (attempt.source, attempt.outcome, attempt.fingerprint) == ("message", "succeeded", {"machine": "fake"})
    events = events_of(host.engine, job_id)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.code for event in events if event.type == "status"] == ["queued", "starting", "running", "succeeded"]
    assert events[-1].type == "done"
    checkpoint = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)[-1]
    assert host.blobs.exists(checkpoint.sha256)


def submit_orchestrator(engine: Engine, **fake: Any) -> str:
    with transaction(engine) as session:
        recipes.publish(session, fakes.published())
        project = make_project(session)
        dataset = make_dataset(session, project)
        spec = {"recipe": "fake", "dataset": dataset.id, "params": {"fake": {"children": 4, **fake}}}
        return make_job(session, project, spec=spec, recipe="fake", dataset_id=dataset.id).id


def children_of(engine: Engine, job_id: str) -> list[tables.Job]:
    with transaction(engine, read_only=True) as session:
        return list(session.scalars(select(tables.Job).where(tables.Job.parent_id == job_id).order_by(tables.Job.id)))


def test_an_orchestrating_job_runs_its_children_on_the_only_slot(host: Host) -> None:
    job_id = submit_orchestrator(host.engine, failing_child=1)
    assert work(host, "poll", internal=False) == 7, "the parent three times, and four children between"
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 3)
    assert job.result == {"0": "succeeded", "1": "failed", "2": "succeeded", "3": "succeeded"}
    assert [(child.child_key, child.project_id) for child in children_of(host.engine, job_id)] == [
        (key, job.project_id) for key in "0123"
    ]
    moves = [event.code for event in events_of(host.engine, job_id) if event.type == "status"]
    assert moves == ["queued", "starting", "running", "waiting", "queued", "starting", "running", "waiting", "queued",
                     "starting", "running", "succeeded"]  # fmt: skip


@pytest.mark.parametrize("kill_at", [0, 2, 4])  # before the first round, before the second, before the result
def test_a_killed_orchestrator_makes_no_child_twice(host: Host, kill_at: int) -> None:
    job_id = submit_orchestrator(host.engine, kill_at=kill_at, faulty_attempts=kill_at // 2 + 1)
    work(host, "poll", internal=False)
    while job_of(host.engine, job_id).status == Status.QUEUED:
        go_on(host, job_id)
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 4)
    assert [child.child_key for child in children_of(host.engine, job_id)] == list("0123")
    assert all(child.attempt == 1 for child in children_of(host.engine, job_id))


def go_on(host: Host, job_id: str) -> None:
    """Run the next attempt now, and whatever follows from it."""
    set_job(host.engine, job_id, not_before=0.0)
    assert work(host, "poll", internal=False) >= 1


def test_a_supervisor_lost_in_the_middle_of_inserting_inserts_nothing_twice(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit_orchestrator(host.engine)
    make, calls = children.make, list[Any]()

    def dies_at_the_second(*given: Any) -> tables.Job:
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("the supervisor died")
        return make(*given)

    monkeypatch.setattr(children, "make", dies_at_the_second)
    work(host, "poll", internal=False)
    assert children_of(host.engine, job_id) == [], "a round is inserted as a whole"
    monkeypatch.undo()
    assert job_of(host.engine, job_id).status == Status.QUEUED
    go_on(host, job_id)
    assert job_of(host.engine, job_id).status == Status.SUCCEEDED
    assert [child.child_key for child in children_of(host.engine, job_id)] == list("0123")


@pytest.mark.parametrize("when", ["waiting", "planning"])
def test_a_stopped_orchestrator_gathers_what_is_there(host: Host, when: str) -> None:
    job_id = submit_orchestrator(host.engine)
    held = claim_and_insert(host) if when == "waiting" else None
    project = job_of(host.engine, job_id).project_id
    if held is None:  # the wish comes while the first round is planned: it is not even inserted
        set_job(host.engine, job_id, wanted="stop")
    else:
        with transaction(host.engine) as session:
            jobs.request(session, project, job_id, "stop")
    assert work(host, "poll", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert job.status == Status.STOPPED
    assert job.result == ({"a": "cancelled", "b": "cancelled"} if held else {})
    assert len(children_of(host.engine, job_id)) == (2 if held else 0)


def test_a_cancelled_orchestrator_takes_its_children_along(host: Host) -> None:
    job_id = submit_orchestrator(host.engine)
    held = claim_and_insert(host)
    with transaction(host.engine) as session:
        jobs.request(session, held.project_id, job_id, "cancel")
    assert work(host, "poll", internal=False) == 0, "nothing is left to run"
    assert job_of(host.engine, job_id).status == Status.CANCELLED
    assert [child.status for child in children_of(host.engine, job_id)] == [Status.CANCELLED] * 2


def claim_and_insert(host: Host) -> attempts.Held:
    """Bring an orchestrating job to where it waits for its first two children."""
    with transaction(host.engine) as session:
        found = claims.claim(
            session, worker="wrk_test", source="poll", internal=False, devices=frozenset({"cpu"}), gpus_free=0,
            lease_seconds=60,
        )  # fmt: skip
        assert found is not None
        held, parent = found
        body = {"recipe": "fake", "dataset": parent.dataset_id, "model": {"architecture": "small_cnn"}}
        endings.insert_children(session, held, [{"child_key": key, **body} for key in ("a", "b")])
        return held


def test_a_trainer_gets_no_credentials(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEYARD_ADMIN_KEY", "secret")
    job_id = submit(host.engine, steps=1)
    work(host, "poll", internal=False)
    (began,) = [event for event in events_of(host.engine, job_id) if event.code == "trainer.began"]
    assert "PATH" in began.data["environment"]
    assert not [name for name in began.data["environment"] if name.startswith(("TUNEYARD", "AWS", "PG"))]


def test_a_killed_trainer_is_a_system_failure_and_the_next_attempt_goes_on(host: Host) -> None:
    job_id = submit(host.engine, steps=12, checkpoint_every=5, kill_at=8)
    assert work(host, "message", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert (job.status, job.status_reason, job.losses) == (Status.QUEUED, "retrying", 1)
    assert job.not_before > 0
    (lost,) = attempts_of(host.engine, job_id)
    assert lost.error is not None
    assert (lost.error["code"], lost.error["class"]) == ("trainer_killed", "system")
    again(host, job_id)
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt, job.exact) == (Status.SUCCEEDED, 2, True)
    assert job.plan == {"threads": 1, "made_in_attempt": 1}  # the first attempt's plan is used again
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(12)
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 13))
    began = [event.data["step"] for event in events_of(host.engine, job_id) if event.code == "trainer.began"]
    assert began == [0, 5]


@pytest.mark.parametrize(
    ("fake", "code"),
    [
        ({"exit_at": 3}, "trainer_exited"),
        ({"kill_at": 3, "signal": int(signal.SIGSEGV)}, "trainer_crashed"),
        ({"kill_at": 3, "signal": int(signal.SIGABRT)}, "trainer_crashed"),
        ({"garbage_at": 3}, "protocol"),
        ({"hang_at": 3}, "no_progress"),
        ({"silent_end": True}, "trainer_exited"),
        ({"escape": True}, "protocol"),
    ],
)
def test_whatever_a_trainer_does_it_is_classed_and_tried_again(host: Host, fake: dict[str, Any], code: str) -> None:
    host.settings = host.settings.model_copy(update={"progress_seconds": 1.5})
    job_id = submit(host.engine, steps=6, **fake)
    assert work(host, "poll", internal=False) == 1
    job = job_of(host.engine, job_id)
    (attempt,) = attempts_of(host.engine, job_id)
    assert job.status == Status.QUEUED
    assert attempt.error is not None
    assert attempt.error["code"] == code
    again(host, job_id)
    if "escape" not in fake:
        assert job_of(host.engine, job_id).status == Status.SUCCEEDED
        assert weights_of(host.engine, host.blobs, job_id) == digest_after(6)


def test_the_last_output_of_a_crash_is_kept(host: Host) -> None:
    job_id = submit(host.engine, exit_at=1)
    work(host, "poll", internal=False)
    (output,) = [event for event in events_of(host.engine, job_id) if event.code == "trainer.output"]
    assert "about to exit" in output.data["output"]


def test_a_failure_that_the_trainer_names_is_final_unless_it_is_the_systems(host: Host) -> None:
    failure = {"fault": "user", "code": "diverged", "message": "The loss is not finite at step 2."}
    job_id = submit(host.engine, fail_at=2, failure=failure)
    work(host, "poll", internal=False)
    job = job_of(host.engine, job_id)
    assert job.status == Status.FAILED
    assert job.error is not None
    assert (job.error["class"], job.error["code"]) == ("user", "diverged")
    assert events_of(host.engine, job_id)[-1].type == "done"


def test_three_losses_without_a_newer_checkpoint_end_the_job(host: Host) -> None:
    job_id = submit(host.engine, steps=12, kill_at=3, faulty_attempts=99)
    work(host, "poll", internal=False)
    again(host, job_id)
    again(host, job_id)
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.FAILED, 3)
    assert job.error is not None
    assert job.error["code"] == "trainer_killed"


def test_a_cancel_ends_trainer_and_job(host: Host) -> None:
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        set_job(host.engine, job_id, wanted="cancel")
        host.runs[job_id].poke()
    assert job_of(host.engine, job_id).status == Status.CANCELLED
    assert dead(trainer)
    assert job_of(host.engine, job_id).model_id is None


def test_a_cancel_is_heard_without_a_poke_and_kills_who_does_not_listen(host: Host) -> None:
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01, deaf=True)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        set_job(host.engine, job_id, wanted="cancel")
        began = time.monotonic()
    assert time.monotonic() - began < 20  # heartbeat and grace make 3.5 s; the rest is for a busy machine
    assert job_of(host.engine, job_id).status == Status.CANCELLED
    assert dead(trainer)


def test_pause_and_resume_lead_to_the_same_weights(host: Host) -> None:
    job_id = submit(host.engine, steps=60, step_seconds=0.03, checkpoint_every=1000)
    with running(host, job_id):
        set_job(host.engine, job_id, wanted="pause")
    job = job_of(host.engine, job_id)
    assert (job.status, job.losses) == (Status.PAUSED, 0)
    (checkpoint,) = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)
    assert 2 <= checkpoint.step < 60
    set_job(host.engine, job_id, wanted="run", status="queued")
    again(host, job_id)
    assert job_of(host.engine, job_id).status == Status.SUCCEEDED
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(60)


def test_a_stop_keeps_the_model(host: Host) -> None:
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01)
    with running(host, job_id):
        set_job(host.engine, job_id, wanted="stop")
    job = job_of(host.engine, job_id)
    assert job.status == Status.STOPPED
    assert job.result is not None
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(job.result["steps"])


def test_a_drain_hands_the_job_back_with_a_checkpoint(host: Host) -> None:
    job_id = submit(host.engine, steps=60, step_seconds=0.03, checkpoint_every=1000)
    with running(host, job_id):
        host.drain()
    job = job_of(host.engine, job_id)
    assert (job.status, job.status_reason, job.losses, job.lease_owner) == (Status.QUEUED, "drained", 0, None)
    assert rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)
    assert work(host, "poll", internal=False) == 0  # a draining host takes nothing
    host.draining.clear()
    host.drain_at = float("inf")
    again(host, job_id)
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(60)


def test_a_drain_does_not_wait_for_who_does_not_listen(host: Host) -> None:
    host.settings = host.settings.model_copy(update={"drain_seconds": 1.0})
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01, checkpoint_every=50, deaf=True)
    with running(host, job_id):
        began = time.monotonic()
        host.drain()
    assert time.monotonic() - began < 8
    job = job_of(host.engine, job_id)
    assert (job.status, job.status_reason, job.losses) == (Status.QUEUED, "drained", 0)


def test_nothing_is_written_once_another_attempt_holds_the_job(host: Host) -> None:
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        with transaction(host.engine) as session:  # as a sweep and another worker's claim do
            session.execute(
                update(tables.Attempt).where(tables.Attempt.job_id == job_id).values(closed_at=1.0, outcome="lost")
            )
            session.execute(
                update(tables.Job).where(tables.Job.id == job_id).values(attempt=2, lease_owner="wrk_other")
            )
            written = session.get_one(tables.Job, job_id).last_event
    job = job_of(host.engine, job_id)
    assert dead(trainer)
    assert (job.status, job.attempt, job.lease_owner) == (Status.RUNNING, 2, "wrk_other")
    assert job.last_event == written


class Outage:
    """A database that can be switched off for the lease's writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = threading.Event()
        self.refused = 0
        self._transaction = worker.supervisor.lease.transaction
        monkeypatch.setattr(worker.supervisor.lease, "transaction", self)

    @contextlib.contextmanager
    def __call__(self, engine: Engine, *, read_only: bool = False) -> Iterator[Any]:
        if self.on.is_set():
            self.refused += 1
            raise OperationalError("select 1", {}, Exception("server closed the connection unexpectedly"))
        with self._transaction(engine, read_only=read_only) as session:
            yield session


def test_a_short_outage_of_the_database_is_sat_out(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage(monkeypatch)
    job_id = submit(host.engine, steps=150, step_seconds=0.02, checkpoint_every=10)
    with running(host, job_id):
        outage.on.set()
        until(lambda: outage.refused >= 3)
        outage.on.clear()
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 1)
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(150)
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 151))


def test_a_long_outage_kills_the_trainer_before_the_lease_ends(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage(monkeypatch)
    host.settings = host.settings.model_copy(update={"fence_seconds": 1.0, "lease_seconds": 60.0})
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01, deaf=True)
    with running(host, job_id):
        trainer = trainer_of(host, job_id)
        outage.on.set()
        began = time.monotonic()
        until(lambda: dead(trainer))
        assert time.monotonic() - began < 3
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt, job.lease_owner) == (Status.RUNNING, 1, "wrk_test")  # left to the lease


def test_a_checkpoint_that_newer_ones_replaced_before_it_was_stored_is_left_out(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk or database makes the supervisor late, and the trainer keeps its last two files alone."""
    store, late = Blobs.put_file, iter([True])

    def slow(blobs: Blobs, engine: Engine, path: Path) -> Any:
        if next(late, False):
            path.unlink()
            raise FileNotFoundError(path)
        return store(blobs, engine, path)

    monkeypatch.setattr(Blobs, "put_file", slow)
    job_id = submit(host.engine, steps=20, checkpoint_every=5)
    again(host, job_id)
    assert job_of(host.engine, job_id).status == "succeeded"
    (attempt,) = attempts_of(host.engine, job_id)
    assert attempt.error is None
    steps = [row.step for row in rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)]
    assert steps == [10, 15]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(host: Host) -> None:
    job_id = submit(host.engine, steps=20, checkpoint_every=5, kill_at=17)
    work(host, "poll", internal=False)
    checkpoints = rows_of(host.engine, tables.Checkpoint, job_id, tables.Checkpoint.step)
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 15]
    path = host.blobs.path(checkpoints[-1].sha256)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"bits that rotted")
    again(host, job_id)
    assert weights_of(host.engine, host.blobs, job_id) == digest_after(20)
    events = events_of(host.engine, job_id)
    assert [event.data["step"] for event in events if event.code == "trainer.began"] == [0, 10]
    assert [event.message for event in events if event.code == "checkpoint.damaged"] == [
        "The checkpoint of step 15 is damaged; the one before it is used."
    ]
    metrics = rows_of(host.engine, tables.Metric, job_id, tables.Metric.step)
    assert [row.step for row in metrics] == list(range(1, 21))


def test_a_full_disk_is_a_resource_failure(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host.blobs, "put_file", full)
    job_id = submit(host.engine, steps=10)
    work(host, "poll", internal=False)
    job = job_of(host.engine, job_id)
    assert job.status == Status.FAILED
    assert job.error is not None
    assert (job.error["class"], job.error["code"]) == ("resource", "disk_full")


def test_a_broken_supervisor_gives_the_job_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(host.blobs, "put_file", broken)
    job_id = submit(host.engine, steps=10)
    work(host, "poll", internal=False)
    job = job_of(host.engine, job_id)
    (attempt,) = attempts_of(host.engine, job_id)
    assert job.status == Status.QUEUED
    assert attempt.error is not None
    assert attempt.error["code"] == "supervisor"


def test_endless_output_is_cut(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.supervisor.wire, "LOG_BYTES", 1000)
    job_id = submit(host.engine, steps=10_000, step_seconds=0.01, output_bytes=100_000)
    with running(host, job_id):
        log = host.runs[job_id]._scratch.log
        until(lambda: log.stat().st_size < 1000)
        set_job(host.engine, job_id, wanted="cancel")
    assert job_of(host.engine, job_id).status == Status.CANCELLED


def test_one_host_runs_its_queue_in_order_without_waiting_for_polls(host: Host) -> None:
    with transaction(host.engine) as session:
        project = make_project(session)
        spec = {"recipe": "image_classification", "params": {"fake": {"steps": 1}}}
        ids = [make_job(session, project, spec=spec, priority=priority).id for priority in (0, 0, 5)]
    assert work(host, "message", internal=False) == 3
    finished = [job_of(host.engine, job_id).started_at for job_id in ids]
    assert all(job_of(host.engine, job_id).status == Status.SUCCEEDED for job_id in ids)
    assert finished[2] < finished[0] < finished[1]  # type: ignore[operator]
    assert [attempts_of(host.engine, job_id)[0].source for job_id in ids] == ["poll", "poll", "message"]


def test_without_a_free_slot_nothing_is_claimed(host: Host) -> None:
    submit(host.engine)
    seat = host.slots.take(internal=False)
    assert work(host, "message", internal=False) == 0
    host.slots.give_back(seat)
    assert work(host, "message", internal=False) == 1


def test_an_internal_job_does_not_wait_behind_training(host: Host) -> None:
    training = submit(host.engine, steps=10_000, step_seconds=0.01)
    with running(host, training):
        internal = submit(host.engine, steps=1, columns={"recipe": "measure", "kind": "internal", "internal": True})
        assert work(host, "poll", internal=False) == 0  # the training slot is taken
        assert work(host, "message", internal=True) == 1
        assert job_of(host.engine, internal).status == Status.SUCCEEDED
        set_job(host.engine, training, wanted="cancel")


def test_heartbeats_keep_the_lease_of_a_silent_but_living_run(host: Host) -> None:
    host.settings = host.settings.model_copy(update={"fence_seconds": 1.0, "lease_seconds": 1.5})
    job_id = submit(host.engine, steps=3, step_seconds=1.2)
    assert work(host, "poll", internal=False) == 1
    job = job_of(host.engine, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 1)
