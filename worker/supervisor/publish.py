"""What a run made: stored and verified first, then committed together with the end of the job. Torch-free."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from app.domain.errors import SystemFault
from app.domain.jobs import Status
from app.store import children, datasets, endings, models, tables
from app.store.attempts import Held
from app.store.blobs import Stored
from worker.report import Finished, MadeDataset, MadeFile
from worker.supervisor.stage import Scratch

Store = Callable[[Path], Stored]


@dataclass(frozen=True)
class Made:
    """What is stored and belongs to nobody yet; nothing where the outcome keeps nothing."""

    files: tuple[tuple[str, str, int, str], ...] = ()  # name, media type, bytes, sha256
    model: tuple[tuple[str, int, str], ...] = ()  # name, bytes, sha256
    keeps: bool = False


def store(finished: Finished, scratch: Scratch, put: Store) -> Made:
    """Store the files that a trainer named.

    Raises:
        SystemFault: a file is not there, lies outside scratch, or is not what ingest wrote.
    """
    if finished.outcome not in ("succeeded", "stopped"):
        return Made()

    def one(made: MadeFile) -> tuple[str, str, int, str]:
        stored = put(scratch.find(made.file))
        return made.name, made.media_type, stored.bytes, stored.sha256

    files = tuple(one(made) for made in finished.files)
    model = tuple(one(made) for made in (finished.model.files if finished.model else ()))
    if finished.dataset is not None:
        _store_shards(finished.dataset, scratch, put)
    return Made(files, tuple((name, size, sha256) for name, _, size, sha256 in model), keeps=True)


def _store_shards(dataset: MadeDataset, scratch: Scratch, put: Store) -> None:
    """Store shards and thumbnails; their digests must be those that ingest took while it wrote."""
    for shard in dataset.shards:
        for name, sha256 in ((shard.path, shard.sha256), (shard.thumbnails_path, shard.thumbnails_sha256)):
            if name is not None and put(scratch.find(name)).sha256 != sha256:
                raise SystemFault(f"{name} changed after it was written.", code="storage_corrupt", phase="publish")


def finish(session: Session, held: Held, job: tables.Job, finished: Finished, made: Made) -> tuple[Status, str | None]:
    """Publish model and dataset and end the job, in the caller's one transaction; give the status and the model's id.

    Raises:
        Fenced
    """
    keeps = made.keeps and endings.may_publish(session, held)
    model_id = children.model_of_one(session, job, finished.adopts) if keeps and finished.adopts else None
    if keeps and finished.model is not None:
        model = finished.model
        model_id = models.publish(
            session, job, config=model.config, parameters=model.parameters, metrics=model.metrics, files=made.model
        )
    if keeps and finished.dataset is not None:
        assert job.dataset_id is not None, "an ingest job names its dataset"
        datasets.publish(session, job.dataset_id, finished.dataset)
    status = endings.finish(
        session, held, Status(finished.outcome), result=finished.result, metrics=finished.metrics, best=finished.best,
        model_id=model_id, files=made.files,
    )  # fmt: skip
    return status, model_id
