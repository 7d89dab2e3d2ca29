"""`/v1/datasets/{id}/samples`: browse what is in a dataset; thumbnails were made at ingest, nothing is decoded here."""

from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import Field

from app.database import Database
from app.deps import BlobsDep, DatabaseDep, ReadDep, SettingsDep
from app.domain.datasets import DatasetStatus, Split
from app.domain.errors import Conflict, Detail, Invalid
from app.http.envelope import Out
from app.settings import Settings
from app.store import cache, datasets, owned, samples, tables
from app.store.blobs import Blobs

router = APIRouter(prefix="/v1/datasets/{dataset_id}/samples", tags=["samples"])
DatasetId = Annotated[str, Path(description="`ds_…`")]
Number = Annotated[int, Path(ge=0, lt=2**53, description="Counts from 0 over train, validation and test.")]
UNLABELLED = "unlabelled"  # no class has this name: ingest makes such folders unlabelled


class SampleOut(Out):
    """One row; its picture is at `/v1/datasets/{id}/samples/{number}/image`."""

    object: Literal["sample"] = "sample"
    number: int
    split: Split
    label: int | None
    class_name: str | None = Field(alias="class")
    path: str | None


class Samples(Out):
    """One page of samples; ask for the next one with `?after=<last_id>`, the number of its last sample."""

    object: Literal["list"] = "list"
    data: list[SampleOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.get("")
def read_all(
    dataset_id: DatasetId,
    principal: ReadDep,
    database: DatabaseDep,
    blobs: BlobsDep,
    settings: SettingsDep,
    split: Annotated[Split | None, Query(description="Only this split.")] = None,
    label: Annotated[
        str | None, Query(max_length=200, description=f"Only this class, by name or number, or `{UNLABELLED}`.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[int | None, Query(ge=0, lt=2**53, description="The `last_id` of the page before.")] = None,
) -> Samples:
    """List the samples in their order."""
    dataset, shards = _shards(database, dataset_id, principal.project_id)
    classes: list[str] = (dataset.facts or {}).get("classes", [])
    wanted = samples.Wanted(limit=limit, after=after, split=split, label=_label(label, classes))
    found, has_more = samples.read(shards, _Local(blobs, settings), wanted)
    data = [
        SampleOut.model_validate(
            {
                **asdict(sample),
                "class": classes[sample.label] if sample.label is not None and sample.label < len(classes) else None,
            }
        )
        for sample in found
    ]  # fmt: skip
    ends = (str(data[0].number), str(data[-1].number)) if data else (None, None)
    return Samples(data=data, first_id=ends[0], last_id=ends[1], has_more=has_more)


@router.get(
    "/{number}/image", response_class=Response,
    responses={
        200: {
            "description": "The encoded picture",
            "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)  # fmt: skip
def read_image(
    dataset_id: DatasetId,
    number: Number,
    principal: ReadDep,
    database: DatabaseDep,
    blobs: BlobsDep,
    settings: SettingsDep,
    size: Annotated[samples.Size, Query(description="At most 128 pixels a side, or the uploaded bytes.")] = "original",
) -> Response:
    """Give the picture of one sample."""
    _, shards = _shards(database, dataset_id, principal.project_id)
    data = samples.picture(shards, _Local(blobs, settings), number, size)
    # A dataset never changes, so the browser may keep the picture, for this user only.
    return Response(data, media_type=_media_type(data), headers={"Cache-Control": "private, max-age=3600"})


def _shards(database: Database, dataset_id: str, project_id: str) -> tuple[tables.Dataset, list[tables.Shard]]:
    """Read the rows in a short transaction: none is held while bytes are fetched and read."""
    with database.session(read_only=True) as session:
        dataset = owned.find(session, tables.Dataset, dataset_id, project_id)
        if dataset.status != DatasetStatus.READY:
            raise Conflict(
                f"This dataset is {dataset.status}; only a ready one can be browsed.", code="dataset_not_ready",
                status=dataset.status,
            )  # fmt: skip
        return dataset, datasets.shards(session, dataset_id)


class _Local:
    """Finds the file of a digest on this machine, where it is memory-mapped; a remote store is read once."""

    def __init__(self, blobs: Blobs, settings: Settings) -> None:
        self._blobs, self._budget = blobs, settings.cache_bytes
        self._folder = settings.home_path / "cache" / "blobs"

    def __call__(self, sha256: str) -> FilePath:
        here = self._blobs.path(sha256)
        if here is not None:
            return here
        cache.trim(self._blobs, self._folder, self._budget)  # before: what is brought now must stay
        return cache.bring(self._blobs, self._folder, sha256)


def _label(asked: str | None, classes: list[str]) -> int | None:
    if asked is None:
        return None
    if asked == UNLABELLED:
        return -1
    if asked in classes:
        return classes.index(asked)
    if asked.isdecimal() and int(asked) < len(classes):
        return int(asked)
    close = get_close_matches(asked, classes, n=3) or classes[:10]
    message = f"There is no such class; did you mean {' or '.join([*close, UNLABELLED])}?"
    raise Invalid(f"label: {message}", param="label", details=[Detail(pointer="/query/label", message=message)])


_SIGNATURES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)


def _media_type(data: bytes) -> str:
    """Say what picture this is; only what is surely one is called so, because the bytes come from strangers."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _SIGNATURES if data.startswith(start)), "application/octet-stream")
