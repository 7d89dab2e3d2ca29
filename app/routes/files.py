"""`/v1/jobs/{id}/files`: what a run made besides a model."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from app.deps import BlobsDep, ReadDep, SessionDep
from app.http.download import BYTES, stored
from app.http.envelope import FileOut, Listing, describe_errors
from app.store import jobs

router = APIRouter(tags=["files"])

JobId = Annotated[str, Path(description="`job_…`")]


@router.get("/v1/jobs/{job_id}/files")
def read_all(job_id: JobId, session: SessionDep, principal: ReadDep) -> Listing[FileOut]:
    """List pictures, tables and whatever else the run made."""
    job = jobs.find(session, principal.project_id, job_id)
    rows = jobs.files(session, [job.id])[job.id]
    return Listing(data=[FileOut.model_validate(row, from_attributes=True) for row in rows], has_more=False)


@router.get("/v1/jobs/{job_id}/files/{name}", response_class=Response, responses={**BYTES, **describe_errors(416)})
def read_file(
    job_id: JobId,
    name: Annotated[str, Path(description="As listed")],
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    blobs: BlobsDep,
) -> Response:
    """Download one of them."""
    job = jobs.find(session, principal.project_id, job_id)
    row = jobs.file(session, job.id, name)
    return stored(request, blobs, sha256=row.sha256, size=row.bytes, media_type=row.media_type, name=row.name)
