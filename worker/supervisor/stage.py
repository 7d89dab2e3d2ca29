"""Brings a job's inputs to local disk and writes the order for its trainer. Torch-free.

Layout below the home: `cache/blobs/<sha256>` holds verified inputs, shared by the jobs of this host (hard links where
the store is local); `scratch/<job>/<attempt>/` belongs to one attempt, with links to its inputs, so that nothing the
cache evicts is ever missed by a job that runs.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import structlog
from sqlalchemy import Engine, or_, select
from sqlalchemy.orm import Session

from app.domain.datasets import DatasetFacts, Shard
from app.domain.errors import DataFault, SystemFault, UserFault
from app.domain.jobs import Wanted
from app.domain.models import ModelConfig
from app.settings import Settings
from app.store import cache, checkpoints, children, recipes, tables
from app.store.blobs import Blobs, CorruptBlob, MissingBlob
from app.store.session import transaction
from worker.report import BaseModelInput, Limits, Order
from worker.supervisor.deaths import OUT_OF_MEMORY

log = structlog.get_logger(__name__)

Kind = Literal["pretrain", "finetune", "apply", "internal"]
WEIGHTS = "model.safetensors"
FORGOTTEN_SECONDS = 3600.0  # scratch of an attempt that is no longer open


@dataclass(frozen=True)
class Inputs:
    """What SQL says that a job needs."""

    dataset: DatasetFacts | None
    model: tuple[str, ModelConfig, str] | None  # id, config, digest of its weights
    upload: tuple[str, str | None] | None  # digest, file name
    checkpoints: Sequence[tables.Checkpoint]  # the best choice first
    children: tuple[dict[str, Any], ...]
    plans: bool  # it only plans other jobs: facts are enough, no bytes are fetched
    killed_for_memory: bool  # the attempt before this one


@dataclass(frozen=True)
class Staged:
    """An order that was written, the step it goes on from, and the checkpoints that could not be used."""

    order: Order
    path: Path
    from_step: int
    damaged: Sequence[tables.Checkpoint]


class Scratch:
    """The folder of one attempt."""

    def __init__(self, settings: Settings, job_id: str, attempt: int) -> None:
        self.folder = settings.home_path / "scratch" / job_id / str(attempt)
        self.inputs = self.folder / "inputs"
        self.log = self.folder / "trainer.log"

    def make(self) -> None:
        """Make it anew; the home is private to this user."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.inputs.mkdir(parents=True, mode=0o700)

    def remove(self) -> None:
        """Remove it, and the job's folder when this was the last attempt in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def find(self, name: str) -> Path:
        """Give the path of a file that the trainer named.

        Raises:
            SystemFault: it lies elsewhere, or is not a plain file.
        """
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            raise SystemFault(f"The trainer named {name!r}, which is no file in its scratch folder.", code="protocol")
        return path

    def is_gone(self, name: str) -> bool:
        """Say whether there is nothing by that name any more."""
        return not os.path.lexists(self.folder / name)


def stage(
    engine: Engine, blobs: Blobs, settings: Settings, job: tables.Job, scratch: Scratch, *, threads: int, device: str,
    check: Callable[[], None] = lambda: None,
) -> Staged:  # fmt: skip
    """Fetch the inputs of `job` and write `order.json`. `check` is called between files and may raise to give up.

    Raises:
        JobFault: an input is missing, deleted or damaged.
    """
    with transaction(engine, read_only=True) as session:
        inputs = find_inputs(session, job)
    scratch.make()
    home_cache = settings.home_path / "cache"

    def bring(sha256: str, name: str) -> str:
        check()
        # After a loss everything is looked at again: the trainer may have found that a file changed on this disk.
        brought = cache.bring(blobs, home_cache / "blobs", sha256, again=job.losses > 0)
        return str(_link(brought, scratch.inputs / name))

    dataset = inputs.dataset
    if dataset is not None and not inputs.plans:
        shards = (
            shard.model_copy(update={"path": bring(shard.sha256, f"{shard.split}-{shard.index:05d}.arrow")})
            for shard in dataset.shards
        )
        dataset = dataset.model_copy(update={"shards": tuple(shards)})
    model = upload = None
    if inputs.model is not None:
        identity, config, sha256 = inputs.model
        weights = "" if inputs.plans else bring(sha256, WEIGHTS)
        model = BaseModelInput(id=identity, config=config, weights=weights)
    if inputs.upload is not None:
        upload = bring(inputs.upload[0], "upload")
    state = scratch.inputs / "checkpoint.safetensors"
    checkpoint, damaged = _newest_valid(blobs, inputs.checkpoints, state, check)
    order = Order(
        job=job.id, attempt=job.attempt, kind=cast("Kind", job.kind), recipe=job.recipe, spec=job.spec, plan=job.plan,
        dataset=dataset, model=model, upload=upload,
        upload_name=inputs.upload[1] if inputs.upload else None, checkpoint=str(state) if checkpoint else None,
        spare_memory=inputs.killed_for_memory,
        children=inputs.children, stopping=job.wanted == Wanted.STOP, scratch=str(scratch.folder),
        cache=str(home_cache), cache_bytes=settings.cache_bytes,
        threads=threads, device=device,
        limits=Limits(
            max_entries=settings.max_entries, max_entry_bytes=settings.max_entry_bytes,
            max_unpacked_bytes=settings.max_unpacked_bytes, max_ratio=settings.max_ratio,
            max_pixels=settings.max_pixels,
        ),
        silence_seconds=settings.fence_seconds,
    )  # fmt: skip
    path = scratch.folder / "order.json"
    path.write_text(order.model_dump_json(), encoding="utf-8")
    return Staged(order, path, checkpoint.step if checkpoint else 0, damaged)


def find_inputs(session: Session, job: tables.Job) -> Inputs:
    """Read which rows and blobs a job starts from."""
    dataset, upload = None, None
    if job.internal and job.recipe in ("ingest", "import_model"):
        upload = _upload(session, job)
    elif job.dataset_id is not None:
        dataset = _dataset(session, job.dataset_id)
    return Inputs(
        dataset=dataset,
        model=_model(session, job.base_model_id) if job.base_model_id else None,
        upload=upload,
        checkpoints=checkpoints.to_resume(session, job),
        children=children.ended(session, job),
        plans=_plans(session, job),
        killed_for_memory=_killed_for_memory(session, job),
    )


def _dataset(session: Session, dataset_id: str) -> DatasetFacts:
    row = session.get(tables.Dataset, dataset_id)
    if row is None or row.deleted_at is not None or row.facts is None:
        raise DataFault(f"Dataset {dataset_id} is gone.", code="dataset_gone", hint="Submit the job with another one.")
    shards = session.scalars(
        select(tables.Shard)
        .where(tables.Shard.dataset_id == dataset_id)
        .order_by(tables.Shard.split, tables.Shard.index)
    ).all()
    found = [
        Shard.model_validate(
            {
                "split": shard.split,
                "index": shard.index,
                "rows": shard.rows,
                "sha256": shard.sha256,
                "bytes": shard.bytes,
            }
        )
        for shard in shards
    ]
    return DatasetFacts.model_validate({**row.facts, "shards": found})


def _model(session: Session, model_id: str) -> tuple[str, ModelConfig, str]:
    row = session.get(tables.Model, model_id)
    sha256 = session.scalar(
        select(tables.ModelFile.sha256).where(tables.ModelFile.model_id == model_id, tables.ModelFile.name == WEIGHTS)
    )
    if row is None or row.deleted_at is not None or row.config is None or sha256 is None:
        raise UserFault(f"Model {model_id} is gone.", code="model_gone", hint="Submit the job with another one.")
    return model_id, ModelConfig.model_validate(row.config), sha256


def _upload(session: Session, job: tables.Job) -> tuple[str, str | None] | None:
    """Find the bytes that an internal job reads; a builtin dataset has none."""
    found = session.execute(
        select(tables.Upload.sha256, tables.Upload.filename)
        .outerjoin(tables.Dataset, tables.Dataset.upload_id == tables.Upload.id)
        .outerjoin(tables.Model, tables.Model.upload_id == tables.Upload.id)
        .where(or_(tables.Dataset.job_id == job.id, tables.Model.job_id == job.id))
        .limit(1)
    ).one_or_none()
    return (found.sha256, found.filename) if found else None


def _plans(session: Session, job: tables.Job) -> bool:
    recipe = None if job.internal else recipes.find(session, job.recipe)
    return recipe is not None and bool(recipe.requires.get("plans"))


def _killed_for_memory(session: Session, job: tables.Job) -> bool:
    """Say how the last attempt ended that came as far as a plan, or died on the way to it."""
    before = session.scalars(
        select(tables.Attempt)
        .where(tables.Attempt.job_id == job.id, tables.Attempt.attempt < job.attempt)
        .order_by(tables.Attempt.attempt.desc())
    )
    last = next((each for each in before if each.fingerprint or each.error), None)
    return last is not None and (last.error or {}).get("code") == OUT_OF_MEMORY


def _newest_valid(
    blobs: Blobs, choices: Sequence[tables.Checkpoint], to: Path, check: Callable[[], None]
) -> tuple[tables.Checkpoint | None, list[tables.Checkpoint]]:
    """Fetch the first checkpoint whose bytes are still those that were stored; the hash is taken every time."""
    damaged: list[tables.Checkpoint] = []
    for checkpoint in choices:
        check()
        try:
            blobs.fetch(checkpoint.sha256, to)
        except (CorruptBlob, MissingBlob) as fault:
            log.warning("a checkpoint cannot be used", job=checkpoint.job_id, step=checkpoint.step, error=fault.message)
            damaged.append(checkpoint)
        else:
            return checkpoint, damaged
    return None, damaged


def _link(source: Path, to: Path) -> Path:
    try:
        os.link(source, to)
    except OSError:
        return source
    return to


def tidy(engine: Engine, blobs: Blobs, settings: Settings) -> None:
    """Keep the input cache within its budget, oldest first, and remove the scratch of attempts that are over."""
    cache.trim(blobs, settings.home_path / "cache" / "blobs", settings.cache_bytes)
    with transaction(engine, read_only=True) as session:
        rows = session.execute(
            select(tables.Attempt.job_id, tables.Attempt.attempt).where(tables.Attempt.closed_at.is_(None))
        ).all()
    still_open = {(row.job_id, str(row.attempt)) for row in rows}
    for folder in (settings.home_path / "scratch").glob("*/*"):
        with contextlib.suppress(OSError):
            old = folder.stat().st_mtime < time.time() - FORGOTTEN_SECONDS
            if old and (folder.parent.name, folder.name) not in still_open:
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.rmdir()
