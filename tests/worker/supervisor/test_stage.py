"""Staging: what SQL says a job needs lies on disk, verified, and the order names it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.domain.errors import DataFault, Failure, SystemFault, UserFault
from app.domain.jobs import Actor, Status
from app.settings import Settings
from app.store import attempts, endings, life, tables
from app.store.blobs import Blobs, CorruptBlob, Stored, open_blobs
from app.store.cache import ABANDONED_SECONDS
from app.store.session import make_engine, transaction
from tests.databases import template
from tests.factories import make_blob, make_dataset, make_job, make_model, make_project
from worker.supervisor.stage import Scratch, Staged, stage, tidy

pytestmark = pytest.mark.worker


@pytest.fixture
def own(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)  # pyright: ignore[reportCallIssue]


@pytest.fixture
def blobs(own: Settings) -> Blobs:
    return open_blobs(own)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(template("sqlite", tmp_path, str)())
    yield engine
    engine.dispose()


def prepare(engine: Engine, blobs: Blobs, own: Settings, job_id: str, **options: Any) -> tuple[Staged, Scratch]:
    with transaction(engine, read_only=True) as session:
        job = session.get_one(tables.Job, job_id)
    scratch = Scratch(own, job_id, 1)
    return stage(engine, blobs, own, job, scratch, threads=3, device="cpu", **options), scratch


def bytes_of(path: str | None) -> bytes:
    assert path is not None
    return Path(path).read_bytes()


def job_on_shards(engine: Engine, blobs: Blobs, count: int = 2) -> tuple[str, list[Stored]]:
    shards = [make_blob(engine, blobs) for _ in range(count)]
    with transaction(engine) as session:
        project = make_project(session)
        dataset = make_dataset(session, project)
        for index, shard in enumerate(shards):
            session.add(
                tables.Shard(
                    dataset_id=dataset.id, split="train", index=index, rows=4, bytes=shard.bytes, sha256=shard.sha256
                )
            )
        return make_job(session, project, dataset_id=dataset.id).id, shards


def test_the_shards_of_a_dataset_are_staged_by_link(engine: Engine, blobs: Blobs, own: Settings) -> None:
    job_id, shards = job_on_shards(engine, blobs)
    staged, _ = prepare(engine, blobs, own, job_id)
    order = staged.order
    assert order.dataset is not None
    assert (order.threads, order.checkpoint, order.model, order.upload) == (3, None, None, None)
    assert order.silence_seconds == own.fence_seconds
    for shard, stored in zip(order.dataset.shards, shards, strict=True):
        assert shard.path is not None
        stored_path = blobs.path(stored.sha256)
        assert stored_path is not None
        assert os.path.samefile(shard.path, stored_path)
    assert order.model_validate_json(staged.path.read_text()) == order


def test_what_the_cache_loses_a_running_job_keeps(engine: Engine, blobs: Blobs, own: Settings) -> None:
    job_id, shards = job_on_shards(engine, blobs, 1)
    staged, _ = prepare(engine, blobs, own, job_id)
    (own.home_path / "cache" / "blobs" / shards[0].sha256).unlink()
    blobs.delete(shards[0].sha256)
    assert staged.order.dataset is not None
    assert len(bytes_of(staged.order.dataset.shards[0].path)) == shards[0].bytes


def test_after_a_loss_the_copies_that_are_here_are_hashed_again(engine: Engine, blobs: Blobs, own: Settings) -> None:
    job_id, shards = job_on_shards(engine, blobs, 1)
    prepare(engine, blobs, own, job_id)
    copy = own.home_path / "cache" / "blobs" / shards[0].sha256
    copy.unlink()
    copy.write_bytes(b"rot")
    for losses, found in ((0, b"rot"), (1, bytes_of(str(blobs.path(shards[0].sha256))))):
        with transaction(engine) as session:
            session.get_one(tables.Job, job_id).losses = losses
        staged, _ = prepare(engine, blobs, own, job_id)
        assert staged.order.dataset is not None
        assert bytes_of(staged.order.dataset.shards[0].path) == found


def test_a_damaged_shard_is_a_system_fault_and_never_reaches_the_trainer(
    engine: Engine, blobs: Blobs, own: Settings
) -> None:
    job_id, shards = job_on_shards(engine, blobs, 1)
    path = blobs.path(shards[0].sha256)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"rot")
    with pytest.raises(CorruptBlob):
        prepare(engine, blobs, own, job_id)


def test_the_model_that_a_job_starts_from_is_staged_with_its_config(
    engine: Engine, blobs: Blobs, own: Settings
) -> None:
    weights = make_blob(engine, blobs)
    with transaction(engine) as session:
        project = make_project(session)
        model = make_model(session, project)
        session.add(
            tables.ModelFile(model_id=model.id, name="model.safetensors", bytes=weights.bytes, sha256=weights.sha256)
        )
        job_id, model_id = make_job(session, project, base_model_id=model.id).id, model.id
    staged, _ = prepare(engine, blobs, own, job_id)
    assert staged.order.model is not None
    assert (staged.order.model.id, staged.order.model.config.classes) == (model_id, ("cat", "dog"))
    assert len(bytes_of(staged.order.model.weights)) == weights.bytes


def test_what_is_gone_is_named(engine: Engine, blobs: Blobs, own: Settings) -> None:
    with transaction(engine) as session:
        project = make_project(session)
        without_files = make_model(session, project)
        deleted = make_dataset(session, project, deleted_at=1.0)
        model_gone = make_job(session, project, base_model_id=without_files.id).id
        dataset_gone = make_job(session, project, dataset_id=deleted.id).id
    with pytest.raises(UserFault, match=r"Model mdl_.* is gone"):
        prepare(engine, blobs, own, model_gone)
    with pytest.raises(DataFault, match=r"Dataset ds_.* is gone"):
        prepare(engine, blobs, own, dataset_gone)


@pytest.mark.parametrize("kind", ["ingest", "import_model"])
def test_an_internal_job_gets_the_upload_it_is_about(engine: Engine, blobs: Blobs, own: Settings, kind: str) -> None:
    stored = make_blob(engine, blobs, b"raw bytes")
    with transaction(engine) as session:
        project = make_project(session)
        upload = tables.Upload(
            id="upl_1", project_id=project.id, filename="cats.zip", bytes=stored.bytes, sha256=stored.sha256
        )
        session.add(upload)
        session.flush()
        job = make_job(session, project, recipe=kind, kind="internal", internal=True)
        if kind == "ingest":
            dataset = make_dataset(session, project, ready=False, upload_id=upload.id, job_id=job.id)
            job.dataset_id = dataset.id
        else:
            make_model(session, project, upload_id=upload.id, job_id=job.id, status="processing", config=None)
        job_id = job.id
    staged, _ = prepare(engine, blobs, own, job_id)
    assert bytes_of(staged.order.upload) == b"raw bytes"
    assert (staged.order.upload_name, staged.order.dataset) == ("cats.zip", None)


def checkpointed_job(engine: Engine, blobs: Blobs, *steps: int) -> str:
    with transaction(engine) as session:
        job_id = make_job(session, make_project(session)).id
    with transaction(engine) as session:
        job = life.lock(session, job_id)
        assert job is not None
        lease = life.Lease(worker="wrk_test", seconds=60, source="poll")
        life.move(session, job, Status.STARTING, actor=Actor.CLAIM, lease=lease)
        held = attempts.Held(job_id, job.project_id, job.attempt, "wrk_test")
    for step in steps:
        stored = make_blob(engine, blobs, f"state of {step}".encode())
        with transaction(engine) as session:
            attempts.write_checkpoint(
                session, held, step=step, epoch=0, metrics={}, best_step=None, bytes=stored.bytes, sha256=stored.sha256
            )
    return job_id


@pytest.mark.parametrize(("code", "spares"), [("out_of_memory", True), ("trainer_killed", False)])
def test_the_attempt_after_a_kill_for_memory_is_told_to_spare_it(
    code: str, spares: bool, engine: Engine, blobs: Blobs, own: Settings
) -> None:
    job_id = checkpointed_job(engine, blobs)
    with transaction(engine) as session:
        job = session.get_one(tables.Job, job_id)
        held = attempts.Held(job_id, job.project_id, job.attempt, "wrk_test")
        failure = Failure(fault="system", code=code, message="It was killed.", phase="run", retryable=True)
        endings.give_up(session, held, failure)
        job.attempt += 1  # it is claimed again
    staged, _ = prepare(engine, blobs, own, job_id)
    assert staged.order.spare_memory == spares


def test_the_newest_checkpoint_is_staged(engine: Engine, blobs: Blobs, own: Settings) -> None:
    job_id = checkpointed_job(engine, blobs, 10, 20)
    staged, _ = prepare(engine, blobs, own, job_id)
    assert bytes_of(staged.order.checkpoint) == b"state of 20"
    assert (staged.from_step, list(staged.damaged)) == (20, [])


def test_a_missing_and_a_truncated_checkpoint_are_passed_over(engine: Engine, blobs: Blobs, own: Settings) -> None:
    job_id = checkpointed_job(engine, blobs, 10, 20)
    with transaction(engine, read_only=True) as session:
        by_step = {row.step: row.sha256 for row in session.query(tables.Checkpoint).filter_by(job_id=job_id)}
    blobs.delete(by_step[20])
    staged, _ = prepare(engine, blobs, own, job_id)
    assert bytes_of(staged.order.checkpoint) == b"state of 10"
    assert [checkpoint.step for checkpoint in staged.damaged] == [20]
    path = blobs.path(by_step[10])
    assert path is not None
    path.chmod(0o600)
    os.truncate(path, 3)
    staged, _ = prepare(engine, blobs, own, job_id)
    assert (staged.order.checkpoint, staged.from_step) == (None, 0)
    assert [checkpoint.step for checkpoint in staged.damaged] == [20, 10]


def test_a_retry_starts_from_the_checkpoint_it_was_given(engine: Engine, blobs: Blobs, own: Settings) -> None:
    before = checkpointed_job(engine, blobs, 30)
    with transaction(engine) as session:
        checkpoint = session.query(tables.Checkpoint).filter_by(job_id=before).one()
        job = make_job(session, make_project(session), retry_of=before, resume_from=checkpoint.id)
        job_id = job.id
    staged, _ = prepare(engine, blobs, own, job_id)
    assert bytes_of(staged.order.checkpoint) == b"state of 30"


def test_giving_up_between_files_leaves_the_rest(engine: Engine, blobs: Blobs, own: Settings) -> None:
    job_id, _ = job_on_shards(engine, blobs, 3)
    checks = iter([None, KeyboardInterrupt])

    def check() -> None:
        if (reason := next(checks)) is not None:
            raise reason

    with pytest.raises(KeyboardInterrupt):
        prepare(engine, blobs, own, job_id, check=check)


def test_a_trainer_may_only_name_files_in_its_scratch(own: Settings, tmp_path: Path) -> None:
    scratch = Scratch(own, "job_1", 1)
    scratch.make()
    (scratch.folder / "model").write_text("x")
    (tmp_path / "secret").write_text("x")
    (scratch.folder / "link").symlink_to(tmp_path / "secret")
    assert scratch.find("model").read_text() == "x"
    for name in ("../../../secret", str(tmp_path / "secret"), "link", "inputs", "absent"):
        with pytest.raises(SystemFault, match="no file in its scratch"):
            scratch.find(name)


def test_tidying_keeps_what_is_in_use(engine: Engine, blobs: Blobs, own: Settings) -> None:
    running = checkpointed_job(engine, blobs, 10)
    job_id, shards = job_on_shards(engine, blobs, 1)
    prepare(engine, blobs, own, job_id)
    abandoned, alive = Scratch(own, job_id, 1), Scratch(own, running, 1)
    alive.make()
    fresh = Scratch(own, "job_fresh", 1)
    fresh.make()
    for scratch in (abandoned, alive):
        os.utime(scratch.folder, (time.time() - 7200, time.time() - 7200))
    tidy(engine, blobs, own)
    assert not abandoned.folder.exists()
    assert alive.folder.exists()  # its attempt is still open
    assert fresh.folder.exists()
    cached = own.home_path / "cache" / "blobs" / shards[0].sha256
    assert cached.exists()
    whole = cached.read_bytes()
    cached.unlink()
    cached.write_bytes(whole)  # where nothing can be linked the store's files and these are copies
    coming, old = cached.with_name(".coming"), cached.with_name(".old")
    for path in (coming, old):
        path.write_bytes(b"half")
    long_ago = time.time() - 2 * ABANDONED_SECONDS
    os.utime(old, (long_ago, long_ago))
    tidy(engine, blobs, own)
    assert (cached.exists(), coming.exists(), old.exists()) == (True, True, False)
    blobs.delete(shards[0].sha256)
    tidy(engine, blobs, own)
    assert not cached.exists()  # the store has let it go
