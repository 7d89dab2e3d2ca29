"""`/v1/models`: find, change, download, import, delete."""

import mimetypes
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ConfigDict
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from app.creation import CreationDep
from app.deps import (
    BlobsDep,
    PageDep,
    ReadDep,
    SessionDep,
    WriteDep,
)
from app.domain.errors import Unavailable, UnsupportedMedia
from app.domain.spec import Architecture, Name, Strict
from app.http import imports, zips
from app.http.download import BYTES, stored
from app.http.envelope import Deleted, FailureOut, FileOut, Listing, Object, Out, as_time, describe_errors, listing
from app.http.imports import Description, Tags
from app.patience import PatienceDep
from app.store import models, recipes, tables
from app.store.blobs import MissingBlob

router = APIRouter(prefix="/v1/models", tags=["models"])

ModelId = Annotated[str, Path(description="`mdl_…`")]
Visibility = Literal["private", "public"]


class Lineage(Out):
    """What it was made from; another project's ids are left out."""

    job: str | None = None
    dataset: str | None = None
    base_model: str | None = None
    recipe: str | None = None
    recipe_version: str | None = None


class ModelOut(Object):
    """An immutable trained artefact."""

    object: Literal["model"] = "model"
    name: str
    version: int
    status: Literal["processing", "ready", "failed"]
    task: str | None
    architecture: dict[str, Any] | None
    parameters: int | None
    classes: list[str]
    metrics: dict[str, Any]
    files: list[FileOut]
    lineage: Lineage
    visibility: Visibility
    tags: list[str]
    description: str
    error: FailureOut | None
    created_at: datetime


class ModelChange(Strict):
    """What may be changed; what is left out stays. A new name brings that name's next version."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"visibility": "public", "tags": ["cats"]}]}
    )

    name: Name | None = None
    visibility: Visibility | None = None
    tags: Tags | None = None
    description: Description | None = None


@router.post(
    "", status_code=202,
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": imports.MULTIPART}}}
    },
)  # fmt: skip
async def create(creation: CreationDep) -> ModelOut:
    """Import safetensors; a worker checks them against the named architecture."""
    if creation.media_type != "multipart/form-data":
        raise UnsupportedMedia("Send multipart/form-data with the part `file`, a safetensors file.")

    def check(session: Session, asked: imports.ModelImport) -> Architecture:
        return imports.check(asked, recipes.Architectures(session))

    def insert(session: Session, asked: imports.ModelImport, upload: tables.Upload) -> ModelOut:
        network = check(session, asked)
        described = asked.model_dump(mode="json", exclude={"architecture", "tags", "description"})
        model = models.begin_import(
            session, creation.project_id, upload, name=asked.name, tags=asked.tags, description=asked.description,
            spec={**described, "model": network.model_dump(mode="json")}, max_attempts=creation.settings.max_attempts,
            max_queued_jobs=creation.settings.max_queued_jobs,
        )  # fmt: skip
        return _out(model, [], creation.project_id)

    return await creation.from_form(known=imports.FIELDS, read=imports.read, check=check, insert=insert)


@router.get("")
def read_all(
    session: SessionDep,
    principal: ReadDep,
    page: PageDep,
    name: Annotated[str | None, Query(max_length=200)] = None,
    task: Annotated[str | None, Query(max_length=40)] = None,
    visibility: Annotated[Visibility | None, Query(description="`public` lists those of every project.")] = None,
) -> Listing[ModelOut]:
    """List the project's models, or everybody's public ones."""
    rows, has_more = models.page_of(
        session, principal.project_id, page, name=name, task=task, visibility=visibility
    )  # fmt: skip
    made = models.files(session, [row.id for row in rows])
    return listing([_out(row, made[row.id], principal.project_id) for row in rows], has_more)


@router.get("/{model_id}")
async def read_one(model_id: ModelId, principal: ReadDep, patience: PatienceDep) -> ModelOut:
    """Give a model; with `?wait=` as soon as its import has ended."""

    def look(session: Session) -> ModelOut:
        return _one(session, models.find(session, principal.project_id, model_id), principal.project_id)

    return await patience.look(look, kind="model", id=model_id, ended=("ready", "failed"))


@router.patch("/{model_id}")
def update(model_id: ModelId, asked: ModelChange, session: SessionDep, principal: WriteDep) -> ModelOut:
    """Change the name, visibility, tags or description."""
    model = models.change(
        session, principal.project_id, model_id, name=asked.name, visibility=asked.visibility, tags=asked.tags,
        description=asked.description,
    )  # fmt: skip
    return _one(session, model, principal.project_id)


@router.delete("/{model_id}")
def delete(model_id: ModelId, session: SessionDep, principal: WriteDep) -> Deleted:
    """Delete a model; 409 while a job that has not ended needs it."""
    models.remove(session, principal.project_id, model_id)
    return Deleted(id=model_id, object="model")


@router.get("/{model_id}/files")
def read_files(model_id: ModelId, session: SessionDep, principal: ReadDep) -> Listing[FileOut]:
    """List the weights, their configuration, the model card and the metrics."""
    model = models.find(session, principal.project_id, model_id)
    made = models.files(session, [model.id])[model.id]
    return Listing(data=[_file(row) for row in made], has_more=False)


@router.get("/{model_id}/files/{name}", response_class=Response, responses={**BYTES, **describe_errors(416)})
def read_file(
    model_id: ModelId,
    name: Annotated[str, Path(description="As listed, such as `model.safetensors`")],
    request: Request,
    session: SessionDep,
    principal: ReadDep,
    blobs: BlobsDep,
) -> Response:
    """Download one file, or the part of it that `Range` names."""
    model = models.find(session, principal.project_id, model_id)
    row = models.file(session, model.id, name)
    return stored(
        request, blobs, sha256=row.sha256, size=row.bytes, media_type=_media_type(row.name), name=row.name
    )  # fmt: skip


@router.get(
    "/{model_id}/download", response_class=Response,
    responses={200: {"description": "A zip", "content": {"application/zip": {}}}},
)  # fmt: skip
def download(model_id: ModelId, session: SessionDep, principal: ReadDep, blobs: BlobsDep) -> Response:
    """Download all files as one zip."""
    model = models.find(session, principal.project_id, model_id)
    made = models.files(session, [model.id])[model.id]
    try:
        entries = [(row.name, row.bytes, blobs.open(row.sha256)) for row in made]
    except MissingBlob as error:
        raise Unavailable("The bytes are not in the store; tell the operator.", code="storage_missing") from error
    name = quote(f"{model.name}-v{model.version}.zip", safe="")
    return StreamingResponse(
        zips.stream(entries, made_at=model.created_at), media_type="application/zip",
        headers={"Content-Disposition": f"attachment; filename*=utf-8''{name}", "Cache-Control": "private, no-cache"},
    )  # fmt: skip


def _one(session: Session, row: tables.Model, project_id: str) -> ModelOut:
    return _out(row, models.files(session, [row.id])[row.id], project_id)


def _out(row: tables.Model, files: Sequence[tables.ModelFile], project_id: str) -> ModelOut:
    config = row.config or {}
    lineage: dict[str, Any] = dict(row.lineage)
    if row.project_id != project_id:
        lineage |= {"job": None, "dataset": None, "base_model": None}
    return ModelOut.model_validate(
        {
            "id": row.id, "name": row.name, "version": row.version, "status": row.status, "task": row.task,
            "architecture": config.get("architecture"), "parameters": row.parameters,
            "classes": config.get("classes", []), "metrics": row.metrics, "files": [_file(one) for one in files],
            "lineage": lineage, "visibility": row.visibility, "tags": row.tags, "description": row.description,
            "error": row.error, "created_at": as_time(row.created_at),
        }
    )  # fmt: skip


def _file(row: tables.ModelFile) -> FileOut:
    return FileOut(name=row.name, media_type=_media_type(row.name), bytes=row.bytes, sha256=row.sha256)


def _media_type(name: str) -> str:
    if name.endswith(".md"):
        return "text/markdown; charset=utf-8"
    return mimetypes.guess_type(name)[0] or "application/octet-stream"
