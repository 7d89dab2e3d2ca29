"""`/v1/jobs`: submit, find, wait, steer, retry, delete."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from sqlalchemy.orm import Session

from app.deps import (
    METADATA_FILTER,
    MetadataFilterDep,
    OnceDep,
    PageDep,
    ReadDep,
    SessionDep,
    SettingsDep,
    WriteDep,
)
from app.domain.errors import Conflict
from app.domain.jobs import TERMINAL, Kind, Status, Verb, Wanted
from app.domain.spec import Spec, Strict
from app.http.envelope import Deleted, FailureOut, FileOut, Listing, Object, Out, as_time, as_time_or_null, listing
from app.patience import PatienceDep
from app.settings import Settings
from app.store import checkpoints, jobs, submit, tables

router = APIRouter(tags=["jobs"])

JobId = Annotated[str, Path(description="`job_…`")]


class Queue(Out):
    """Where a queued job stands; null while it is not queued."""

    position: int | None = None


class Progress(Out):
    """How far a run is, by the last heartbeat."""

    fraction: float = 0.0
    phase: str | None = None
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    samples_per_second: float | None = None
    eta_seconds: float | None = None
    updated_at: datetime | None = None


class Children(Out):
    """The jobs that an orchestrating job made."""

    total: int
    by_status: dict[str, int]


class JobOut(Object):
    """One run of a recipe."""

    object: Literal["job"] = "job"
    name: str
    recipe: str
    recipe_version: str
    kind: Kind
    dataset: str | None
    status: Status
    wanted: Wanted
    status_reason: str | None
    queue: Queue
    progress: Progress
    metrics: dict[str, float | None]
    best: dict[str, Any] | None
    model: str | None
    result: dict[str, Any] | None
    files: list[FileOut]
    parent: str | None
    children: Children
    retry_of: str | None
    attempt: int
    max_attempts: int
    exact: bool
    worker: str | None
    error: FailureOut | None
    spec: dict[str, Any]
    plan: dict[str, Any] | None
    priority: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    metadata: dict[str, str]


class DryRun(Out):
    """What a job would be; nothing was kept."""

    spec: dict[str, Any]
    plan: dict[str, Any] | None
    warnings: list[str]


class Retry(Strict):
    """How to run an ended job again."""

    from_checkpoint: bool = False


class _AnySpec:
    """Documents a body as `Spec` without checking it: the recipe's defaults must be laid under it first."""

    @staticmethod
    def __get_pydantic_json_schema__(_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(Spec.__pydantic_core_schema__)


@router.post(
    "/v1/jobs",
    status_code=201,
    responses={
        200: {"model": DryRun, "description": "What it would be, with `dry_run=true`"},
        202: {"model": JobOut, "description": "A measuring job, with `dry_run=measure`"},
    },
)
def create(
    body: Annotated[dict[str, Any], _AnySpec, Body(description="The job; `GET /v1/recipes/{name}` has its schema.")],
    session: SessionDep,
    principal: WriteDep,
    once: OnceDep,
    settings: SettingsDep,
    response: Response,
    dry_run: Annotated[
        Literal["false", "true", "measure"], Query(description="Check only, or run a few steps and measure.")
    ] = "false",
) -> Any:
    """Queue a job, or say what stands in its way."""
    if dry_run == "true":
        submission = submit.prepare(session, principal.project_id, body)
        row = submission.job(principal.project_id, max_attempts=settings.max_attempts)
        warnings = [*submission.warnings, *jobs.doubts(session, row, alive_seconds=settings.lease_seconds)]
        return JSONResponse(DryRun(spec=row.spec, plan=None, warnings=warnings).model_dump(mode="json"))
    once.begin({"body": body, "dry_run": dry_run})
    submission = submit.prepare(session, principal.project_id, body)
    make = submission.job if dry_run == "false" else submission.measuring_job
    row = make(principal.project_id, max_attempts=settings.max_attempts)
    jobs.insert(session, row, warnings=submission.warnings, max_queued_jobs=settings.max_queued_jobs)
    status = 201 if dry_run == "false" else 202
    response.status_code = status
    return once.answer(_one(session, row, settings), location=f"/v1/jobs/{row.id}", status=status)


@router.get("/v1/jobs", openapi_extra=METADATA_FILTER)
def read_all(
    session: SessionDep,
    principal: ReadDep,
    settings: SettingsDep,
    page: PageDep,
    metadata: MetadataFilterDep,
    status: Annotated[list[Status] | None, Query(description="May be given several times.")] = None,
    recipe: Annotated[str | None, Query(max_length=64)] = None,
    parent: Annotated[str | None, Query(max_length=40)] = None,
    kind: Annotated[Kind | None, Query(description="Internal jobs are listed only when asked for.")] = None,
) -> Listing[JobOut]:
    """List the project's jobs."""
    rows, has_more = jobs.page_of(
        session, principal.project_id, page, statuses=status or (), recipe=recipe, parent=parent, kind=kind,
        metadata=metadata,
    )  # fmt: skip
    return listing(_many(session, rows, settings), has_more)


@router.get("/v1/jobs/{job_id}")
async def read_one(job_id: JobId, principal: ReadDep, patience: PatienceDep, settings: SettingsDep) -> JobOut:
    """Give a job; with `?wait=` as soon as its status changes, at once if it has ended."""

    def look(session: Session) -> JobOut:
        return _one(session, jobs.find(session, principal.project_id, job_id), settings)

    return await patience.look(look, kind="job", id=job_id, ended=TERMINAL)


@router.post("/v1/jobs/{job_id}/cancel", status_code=202)
def cancel(job_id: JobId, session: SessionDep, principal: WriteDep, settings: SettingsDep) -> JobOut:
    """End it and keep nothing but its checkpoints."""
    return _steer(session, principal.project_id, job_id, "cancel", settings)


@router.post("/v1/jobs/{job_id}/stop", status_code=202)
def stop(job_id: JobId, session: SessionDep, principal: WriteDep, settings: SettingsDep) -> JobOut:
    """End it early and keep the best model so far."""
    return _steer(session, principal.project_id, job_id, "stop", settings)


@router.post("/v1/jobs/{job_id}/pause", status_code=202)
def pause(job_id: JobId, session: SessionDep, principal: WriteDep, settings: SettingsDep) -> JobOut:
    """Save a checkpoint and give its slot back until it is resumed."""
    return _steer(session, principal.project_id, job_id, "pause", settings)


@router.post("/v1/jobs/{job_id}/resume", status_code=202)
def resume(job_id: JobId, session: SessionDep, principal: WriteDep, settings: SettingsDep) -> JobOut:
    """Queue a paused job again."""
    return _steer(session, principal.project_id, job_id, "resume", settings)


@router.post("/v1/jobs/{job_id}/retry", status_code=201)
def retry(
    job_id: JobId,
    session: SessionDep,
    principal: WriteDep,
    once: OnceDep,
    settings: SettingsDep,
    asked: Annotated[Retry | None, Body()] = None,
) -> JobOut:
    """Make a new job like an ended one, from its newest checkpoint if asked."""
    asked = asked or Retry()
    once.begin(asked)
    old = jobs.find(session, principal.project_id, job_id)
    if old.status not in TERMINAL:
        raise Conflict(f"A job that is {old.status} cannot be retried; cancel it first.", code="cannot_retry",
                       status=old.status)  # fmt: skip
    if old.internal:
        raise Conflict("An internal job cannot be retried; make the call again that began it.", code="cannot_retry",
                       status=old.status)  # fmt: skip
    # The job whose model it started from may be deleted by now; the model itself is what counts.
    again = old.spec | ({"model": old.base_model_id} if str(old.spec.get("model")).startswith("job_") else {})
    submission = submit.prepare(session, principal.project_id, again if old.base_model_id else old.spec)
    row = submission.job(principal.project_id, max_attempts=settings.max_attempts)
    row.retry_of = old.id
    if asked.from_checkpoint:
        kept = checkpoints.to_resume(session, old)
        if not kept:
            raise Conflict("This job has no checkpoint to go on from; retry it from the start.", code="no_checkpoint",
                           status=old.status)  # fmt: skip
        # The same plan, or the steps that follow would be another computation; what is inexact already stays so.
        row.resume_from, row.plan, row.exact = kept[0].id, old.plan, old.exact
    jobs.insert(session, row, max_queued_jobs=settings.max_queued_jobs)
    return once.answer(_one(session, row, settings), location=f"/v1/jobs/{row.id}")


@router.delete("/v1/jobs/{job_id}")
def delete(job_id: JobId, session: SessionDep, principal: WriteDep) -> Deleted:
    """Delete a job that has ended, with its log, numbers, checkpoints and files; its model stays."""
    jobs.remove(session, principal.project_id, job_id)
    return Deleted(id=job_id, object="job")


def _steer(session: Session, project_id: str, job_id: str, verb: Verb, settings: Settings) -> JobOut:
    return _one(session, jobs.request(session, project_id, job_id, verb), settings)


def _one(session: Session, row: tables.Job, settings: Settings) -> JobOut:
    return _many(session, [row], settings)[0]


def _many(session: Session, rows: Sequence[tables.Job], settings: Settings) -> list[JobOut]:
    around = jobs.surroundings(session, rows, alive_seconds=settings.lease_seconds)
    return [_out(row, around[row.id]) for row in rows]


def _out(row: tables.Job, around: jobs.Surroundings) -> JobOut:
    progress = row.progress or {}
    if around.children and row.status not in TERMINAL:  # it is as far as its children are
        progress = progress | {"phase": "children", "fraction": around.children_done}
    return JobOut(
        id=row.id, name=row.name, recipe=row.recipe, recipe_version=row.recipe_version, kind=Kind(row.kind),
        dataset=row.dataset_id, status=Status(row.status), wanted=Wanted(row.wanted),
        status_reason="no_worker_fits" if around.no_worker_fits else row.status_reason,
        queue=Queue(position=around.position),
        progress=Progress.model_validate({**progress, "updated_at": as_time_or_null(progress.get("updated_at"))}),
        metrics=row.metrics, best=row.best, model=row.model_id, result=row.result,
        files=[FileOut.model_validate(file, from_attributes=True) for file in around.files],
        parent=row.parent_id, children=Children(total=sum(around.children.values()), by_status=around.children),
        retry_of=row.retry_of, attempt=row.attempt, max_attempts=row.max_attempts, exact=row.exact,
        worker=row.lease_owner, error=FailureOut.model_validate(row.error) if row.error else None, spec=row.spec,
        plan=row.plan, priority=row.priority, created_at=as_time(row.created_at),
        started_at=as_time_or_null(row.started_at), finished_at=as_time_or_null(row.finished_at), metadata=row.meta,
    )  # fmt: skip
