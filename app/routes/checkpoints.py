"""`/v1/jobs/{id}/checkpoints`: the resumable states of a job that are kept."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from app.deps import BlobsDep, ReadDep, SessionDep
from app.http.download import BYTES, stored
from app.http.envelope import Listing, Object, as_time, describe_errors, listing
from app.store import checkpoints, jobs

router = APIRouter(tags=["checkpoints"])

JobId = Annotated[str, Path(description="`job_…`")]


class CheckpointOut(Object):
    """A resumable state: one safetensors file."""

    object: Literal["checkpoint"] = "checkpoint"
    step: int
    epoch: int
    metrics: dict[str, float | None]
    bytes: int
    sha256: str
    best: bool
    attempt: int
    created_at: datetime


@router.get("/v1/jobs/{job_id}/checkpoints")
def read_all(job_id: JobId, session: SessionDep, principal: ReadDep) -> Listing[CheckpointOut]:
    """List the kept checkpoints, newest first: the last two and the best."""
    jobs.find(session, principal.project_id, job_id)
    rows = checkpoints.of_job(session, job_id)
    return listing(
        [
            CheckpointOut(
                id=row.id, step=row.step, epoch=row.epoch, metrics=row.metrics, bytes=row.bytes, sha256=row.sha256,
                best=row.best, attempt=row.attempt, created_at=as_time(row.created_at),
            )
            for row in rows
        ],
        has_more=False,
    )  # fmt: skip


@router.get(
    "/v1/jobs/{job_id}/checkpoints/{checkpoint_id}/file", response_class=Response,
    responses={**BYTES, **describe_errors(416)},
)  # fmt: skip
def read_file(
    job_id: JobId,
    checkpoint_id: Annotated[str, Path(description="`ckpt_…`")],
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    blobs: BlobsDep,
) -> Response:
    """Download a checkpoint."""
    jobs.find(session, principal.project_id, job_id)
    row = checkpoints.find(session, job_id, checkpoint_id)
    return stored(
        request, blobs, sha256=row.sha256, size=row.bytes, media_type="application/octet-stream",
        name=f"{job_id}-step-{row.step}.safetensors",
    )  # fmt: skip
