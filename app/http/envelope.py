"""The forms that every answer shares: the list, the error body, the tombstone, the error of a job."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.domain.errors import Detail, FaultClass

Item = TypeVar("Item")
Identified = TypeVar("Identified", bound="Object")


class Out(BaseModel):
    """The base of everything we answer. Times are given as seconds since the epoch and rendered as ISO 8601, UTC."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, ser_json_inf_nan="null")


class Object(Out):
    """Anything with an id; the ids of one kind sort by age."""

    id: str


class Listing(Out, Generic[Item]):
    """One page of a list; ask for the next one with `?after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


def listing(items: Sequence[Identified], has_more: bool) -> Listing[Identified]:
    """Make a page of objects that carry an `id`."""
    return Listing(
        data=list(items), first_id=items[0].id if items else None, last_id=items[-1].id if items else None,
        has_more=has_more,
    )  # fmt: skip


class Deleted(Out):
    """What a DELETE answers."""

    id: str
    object: str
    deleted: Literal[True] = True


class FileOut(Out):
    """A stored file: what it is, how long, and the digest of its bytes."""

    name: str
    media_type: str
    bytes: int
    sha256: str


class FailureOut(Out):
    """Why a job, or the dataset or model that it was making, failed."""

    fault: FaultClass = Field(alias="class")
    code: str
    message: str
    hint: str | None = None
    phase: str | None = None
    retryable: bool = False


class ErrorOut(Out):
    """What went wrong and what to do about it; some errors add facts, such as the current `status` of a job."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    code: str
    message: str
    param: str | None = None
    details: list[Detail] = []
    request_id: str


class ErrorBody(Out):
    """The one body of every error."""

    error: ErrorOut


_MEANINGS = {
    400: "Malformed request", 401: "No valid key", 403: "The key lacks the scope", 404: "No such object",
    409: "The present state does not allow this", 413: "Body too large", 415: "Content type not accepted",
    422: "A value is not acceptable", 429: "Too many requests", 500: "Something broke on the server",
    503: "Not available right now",
}  # fmt: skip

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document further error statuses of one route, beside those that every route may give."""
    more = {410: "Expired", 412: "Precondition failed", 416: "Range outside the file"}
    return {status: {"model": ErrorBody, "description": more[status]} for status in statuses}


def as_time(seconds: float) -> datetime:
    """Turn seconds since the epoch into a time that is rendered as ISO 8601 with `Z`."""
    return datetime.fromtimestamp(seconds, UTC)


def as_time_or_null(seconds: float | None) -> datetime | None:
    """Do the same for a time that may not have come yet."""
    return None if seconds is None else as_time(seconds)
