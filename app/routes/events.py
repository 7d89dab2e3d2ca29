"""`/v1/jobs/{id}/events`: the log of a job, as a list or as a stream."""

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.deps import DatabaseDep, NotifierDep, ReadDep
from app.domain.errors import Detail, Invalid
from app.http.envelope import Listing, Object, as_time, listing
from app.store import events, jobs, tables

router = APIRouter(tags=["events"])


class EventOut(Object):
    """One numbered line of a job's log."""

    object: Literal["event"] = "event"
    number: int
    type: Literal["status", "metric", "checkpoint", "log", "done"]
    code: str
    level: Literal["info", "warning", "error"]
    message: str
    data: dict[str, Any]
    attempt: int
    created_at: datetime


class EventStream(StreamingResponse):
    """Server-sent events; calls `leave` when it is over, however it ends."""

    media_type = "text/event-stream"
    leave: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


@router.get(
    "/v1/jobs/{job_id}/events",
    response_model=Listing[EventOut],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The log"}},
)
async def read_all(
    job_id: Annotated[str, Path(description="`job_…`")],
    principal: ReadDep,
    database: DatabaseDep,
    notifier: NotifierDep,
    after: Annotated[int, Query(ge=0, lt=2**31, description="Only what follows this number.")] = 0,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="Most lines of the list; a stream has no end of its own.")
    ] = 100,
    accept: Annotated[str, Header(description="`text/event-stream` streams.", include_in_schema=False)] = "",
    last_event_id: Annotated[str | None, Header(description="Where a broken stream goes on.")] = None,
) -> Any:
    """Give the log of a job: a list, or with `Accept: text/event-stream` a stream that ends when the job does."""
    streams = "text/event-stream" in accept

    def look(session: Session) -> list[tables.Event]:
        jobs.find(session, principal.project_id, job_id)
        return [] if streams else list(events.after(session, job_id, after, limit + 1))

    if not streams:
        found = await database.run(look, read_only=True)
        return listing([_out(event) for event in found[:limit]], has_more=len(found) > limit)
    number = after if not last_event_id else _number(last_event_id)
    leave = notifier.enter(principal.key_id)
    try:
        await database.run(look, read_only=True)
        response = EventStream(
            notifier.lines(job_id, number, _line), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
    except BaseException:
        leave()
        raise
    response.leave = leave
    return response


def _number(last_event_id: str) -> int:
    if not last_event_id.isascii() or not last_event_id.isdecimal() or len(last_event_id) > 10:
        message = "Send back the `id` of the last event that came: a number."
        raise Invalid(
            message, param="Last-Event-ID", details=[Detail(pointer="/header/Last-Event-ID", message=message)]
        )
    return int(last_event_id)


def _out(event: tables.Event) -> EventOut:
    fields = ("id", "number", "type", "code", "level", "message", "data", "attempt")
    return EventOut.model_validate(
        {field: getattr(event, field) for field in fields} | {"created_at": as_time(event.created_at)}
    )


def _line(event: tables.Event) -> bytes:
    # JSON has no bare line break, so one `data:` line always suffices.
    return f"id: {event.number}\nevent: {event.type}\ndata: {_out(event).model_dump_json()}\n\n".encode()
