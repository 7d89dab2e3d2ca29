"""`/v1/datasets`: from bytes or a standard set to validated samples."""

import json
from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import APIRouter, Path, Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy.orm import Session

from app.creation import Creation, CreationDep
from app.deps import (
    METADATA_FILTER,
    MetadataFilterDep,
    PageDep,
    ReadDep,
    SessionDep,
    WriteDep,
)
from app.domain.datasets import Builtin, DatasetTask, OnError
from app.domain.errors import Detail, Invalid, UnsupportedMedia
from app.domain.spec import Metadata, Name, Strict
from app.http.envelope import Deleted, FailureOut, Listing, Object, as_time, listing
from app.patience import PatienceDep
from app.store import datasets, owned, tables, uploads

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
Asked = TypeVar("Asked", bound=BaseModel)
DatasetId = Annotated[str, Path(description="`ds_…`")]


class _New(Strict):
    name: Name
    task: DatasetTask | None = Field(default=None, description="What the labels are for; null finds out.")
    on_error: OnError = Field(default="skip", description="What becomes of the set when an entry is bad.")
    metadata: Metadata = Field(default={})


class NewDataset(_New):
    """A dataset to make of a finished upload, or of a standard set."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"name": "digits", "builtin": "digits"}]}
    )

    upload: str | None = Field(default=None, description="`upl_…`", max_length=64)
    builtin: Builtin | None = Field(default=None, description="`digits` needs no network.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.upload is None) == (self.builtin is None):
            raise ValueError("give either `upload` or `builtin`")
        return self


class DatasetOut(Object):
    """A dataset."""

    object: Literal["dataset"] = "dataset"
    name: str
    version: int
    status: Literal["processing", "ready", "failed"]
    task: str | None
    format: str | None
    bytes: int
    sha256: str | None
    samples: int
    splits: dict[str, int]
    features: dict[str, str]
    classes: list[str]
    report: dict[str, Any]
    progress: dict[str, Any] | None
    job: str | None
    error: FailureOut | None
    created_at: datetime
    metadata: dict[str, str]


def _out(dataset: tables.Dataset, progress: dict[str, Any] | None = None) -> DatasetOut:
    facts = dataset.facts or {}
    return DatasetOut(
        id=dataset.id, name=dataset.name, version=dataset.version, status=dataset.status,  # pyright: ignore
        task=dataset.task or dataset.asked_task, format=dataset.format, bytes=dataset.bytes, sha256=dataset.sha256,
        samples=dataset.samples, splits=facts.get("splits", {}), features=facts.get("features", {}),
        classes=facts.get("classes", []), report=dataset.report or {}, progress=progress, job=dataset.job_id,
        error=FailureOut.model_validate(dataset.error) if dataset.error else None,
        created_at=as_time(dataset.created_at), metadata=dataset.meta,
    )  # fmt: skip


_MULTIPART = {
    "type": "object", "required": ["file", "name"], "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "An archive, or another file of a known format."},
        "name": {"type": "string", "minLength": 1, "maxLength": 200},
        "task": {"type": "string", "enum": ["image_classification", "unlabelled_images"]},
        "on_error": {"type": "string", "enum": ["skip", "fail"]},
        "metadata": {"type": "string", "description": "A JSON object of strings."},
    },
}  # fmt: skip


@router.post(
    "", status_code=202,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": NewDataset.model_json_schema()},
                "multipart/form-data": {"schema": _MULTIPART},
            },
        }
    },
)  # fmt: skip
async def create(creation: CreationDep) -> DatasetOut:
    """Upload a file in one go, or name a finished upload or a standard set; ingest goes on in a worker."""
    if creation.media_type == "multipart/form-data":
        return await creation.from_form(
            known=frozenset(_New.model_fields),
            read=lambda fields: _check(_New, _values(fields)),
            insert=lambda session, asked, upload: _insert(session, creation, asked, upload=upload),
        )
    if creation.media_type == "application/json":
        body = await creation.request.body()
        return await creation.from_json(
            _check(NewDataset, json.loads(body) if body else None),
            lambda session, asked: _insert(
                session, creation, asked, builtin=asked.builtin,
                upload=uploads.take(session, creation.project_id, asked.upload) if asked.upload else None,
            ),
        )  # fmt: skip
    raise UnsupportedMedia("Send multipart/form-data with the part `file`, or application/json.")


def _insert(
    session: Session, creation: Creation, asked: _New, *, upload: tables.Upload | None, builtin: str | None = None
) -> DatasetOut:
    dataset = datasets.insert(
        session, creation.project_id, name=asked.name, upload=upload, builtin=builtin, task=asked.task,
        on_error=asked.on_error, metadata=dict(asked.metadata), max_attempts=creation.settings.max_attempts,
        max_queued_jobs=creation.settings.max_queued_jobs,
    )  # fmt: skip
    return _out(dataset)


def _values(fields: dict[str, str]) -> dict[str, Any]:
    """Read the text fields of a form as the JSON body that they stand for."""
    values: dict[str, Any] = dict(fields)
    if "metadata" in fields:
        message = 'Send a JSON object of strings, such as {"source": "camera 1"}.'
        try:
            values["metadata"] = json.loads(fields["metadata"])
        except (ValueError, RecursionError) as error:
            details = [Detail(pointer="/metadata", message=message)]
            raise Invalid(f"metadata: {message}", param="metadata", details=details) from error
    return values


def _check(model: type[Asked], value: Any) -> Asked:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        items = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        raise RequestValidationError(items, body=value) from error


@router.get("", openapi_extra=METADATA_FILTER)
def read_all(
    session: SessionDep,
    principal: ReadDep,
    page: PageDep,
    metadata: MetadataFilterDep,
    name: Annotated[str | None, Query(max_length=200, description="Only the versions of this name.")] = None,
) -> Listing[DatasetOut]:
    """List the datasets of the project."""
    rows, has_more = datasets.read(session, principal.project_id, page, name=name, metadata=metadata)
    progress = datasets.progress(session, rows)
    return listing([_out(row, progress.get(row.id)) for row in rows], has_more)


@router.get("/{dataset_id}")
async def read_one(dataset_id: DatasetId, principal: ReadDep, patience: PatienceDep) -> DatasetOut:
    """Give one dataset; with `wait`, as soon as it is no longer processing, or after that many seconds."""

    def look(session: Session) -> DatasetOut:
        dataset = owned.find(session, tables.Dataset, dataset_id, principal.project_id)
        return _out(dataset, datasets.progress(session, [dataset]).get(dataset.id))

    return await patience.look(look, kind="dataset", id=dataset_id, ended=("ready", "failed"))


@router.delete("/{dataset_id}")
def delete(dataset_id: DatasetId, session: SessionDep, principal: WriteDep) -> Deleted:
    """Delete a dataset; 409 while a job that is not finished needs it."""
    datasets.remove(session, dataset_id, principal.project_id)
    return Deleted(id=dataset_id, object="dataset")
