"""Every way to say no: errors that become HTTP answers, and failures that end a job."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict


class Detail(BaseModel):
    """One thing to correct: a JSON pointer into the request (or a file or row), and what to do about it."""

    model_config = ConfigDict(frozen=True)

    pointer: str
    message: str


class ApiError(Exception):
    """Something went wrong on the server; the request id finds it in the log."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal"

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        param: str | None = None,
        details: Sequence[Detail] = (),
        retry_after: int | None = None,
        **facts: Any,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.code = code or type(self).code
        self.param = param
        self.details = tuple(details)
        self.retry_after = retry_after
        self.facts = facts  # extra public fields of the body, such as the current `status` of a job
        super().__init__(self.message)


class Malformed(ApiError):
    """The request cannot be read; check that the body is valid JSON or multipart."""

    status, type, code = 400, "invalid_request", "malformed"


class Unauthenticated(ApiError):
    """Send a valid key as `Authorization: Bearer ty_…`."""

    status, type, code = 401, "authentication", "unauthenticated"


class Forbidden(ApiError):
    """This key lacks the scope that the call needs."""

    status, type, code = 403, "permission", "forbidden"


class NotFound(ApiError):
    """There is no such object in this project."""

    status, type, code = 404, "not_found", "not_found"


class Conflict(ApiError):
    """The object's present state does not allow this."""

    status, type, code = 409, "conflict", "conflict"


class Expired(ApiError):
    """This object has expired; start again."""

    status, type, code = 410, "expired", "expired"


class TooLarge(ApiError):
    """The body is larger than this server accepts."""

    status, type, code = 413, "invalid_request", "too_large"


class UnsupportedMedia(ApiError):
    """This content type is not accepted here."""

    status, type, code = 415, "invalid_request", "unsupported_media_type"


class RangeNotSatisfiable(ApiError):
    """The range lies outside the file."""

    status, type, code = 416, "invalid_request", "range_not_satisfiable"


class Invalid(ApiError):
    """A value is not acceptable; see `details`."""

    status, type, code = 422, "invalid_request", "invalid"


class TooManyRequests(ApiError):
    """Too many requests; wait and try again."""

    status, type, code = 429, "rate_limit", "too_many_requests"


class Unavailable(ApiError):
    """The service cannot do this right now; try again."""

    status, type, code = 503, "unavailable", "unavailable"


FaultClass = Literal["user", "data", "resource", "system"]


class Failure(BaseModel):
    """Why a job failed, as stored in `job.error` and sent from the trainer to its supervisor.

    `fault` is serialised as `class`: `user` (the spec), `data` (names the file or row), `resource` (memory, disk; says
    what would fit), `system` (lost worker, storage, device). Only `system` is ever retried.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: FaultClass
    code: str
    message: str
    hint: str | None = None
    phase: str | None = None
    retryable: bool = False

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Failure":
        """Read the stored form, in which the field is called `class`."""
        return cls(fault=value["class"], **{key: item for key, item in value.items() if key != "class"})

    def to_json(self) -> dict[str, Any]:
        """Give the stored and public form: `{class, code, message, hint, phase, retryable}`."""
        return {"class": self.fault, **self.model_dump(exclude={"fault"})}


class JobFault(Exception):
    """A job cannot go on. Raised anywhere below the trainer or in the supervisor; `run.py` turns it into a state."""

    fault: ClassVar[FaultClass] = "system"
    code: str = "fault"

    def __init__(
        self, message: str, *, code: str | None = None, hint: str | None = None, phase: str | None = None
    ) -> None:
        self.message, self.hint, self.phase = message, hint, phase
        self.code = code or type(self).code
        super().__init__(message)

    def failure(self, phase: str | None = None) -> Failure:
        """Give the record that is stored with the job."""
        return Failure(
            fault=self.fault, code=self.code, message=self.message, hint=self.hint,
            phase=self.phase or phase, retryable=self.fault == "system",
        )  # fmt: skip


class UserFault(JobFault):
    """The spec asks for something that cannot work."""

    fault, code = "user", "invalid_spec"


class DataFault(JobFault):
    """The data cannot be used; the message names the file or row."""

    fault, code = "data", "invalid_data"


class ResourceFault(JobFault):
    """Out of memory or disk; the hint says what would fit."""

    fault, code = "resource", "out_of_resources"


class SystemFault(JobFault):
    """Something beneath the job broke; worth another attempt."""

    fault, code = "system", "system"
