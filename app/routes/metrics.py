"""`/v1/jobs/{id}/metrics`: the numbers of a job, thinned."""

from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.deps import ReadDep, SessionDep
from app.store import jobs, metrics

router = APIRouter(tags=["metrics"])

Series = dict[str, list[tuple[int, float | None]]]


@router.get("/v1/jobs/{job_id}/metrics")
def read_all(
    job_id: Annotated[str, Path(description="`job_…`")],
    session: SessionDep,
    principal: ReadDep,
    name: Annotated[
        list[Annotated[str, Query(max_length=120)]] | None,
        Query(description="May be given several times; none is all.", max_length=100),
    ] = None,
    after_step: Annotated[int | None, Query(ge=-1, lt=2**53)] = None,
    max_points: Annotated[int, Query(ge=5, le=10_000, description="Of each; first, last and extremes are kept.")] = 500,
) -> Series:
    """Give `{name: [[step, value], …]}`; null is a number that was not finite."""
    jobs.find(session, principal.project_id, job_id)
    found = metrics.read(session, job_id, name, after_step, max_points)
    return {name: list(points) for name, points in found.items()}
