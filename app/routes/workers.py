"""`/v1/workers`: who does the work, and what they offer."""

from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter

from app.deps import ReadDep, SessionDep, SettingsDep
from app.http.envelope import Listing, Object, as_time, listing
from app.store import workers

router = APIRouter(tags=["workers"])


class WorkerOut(Object):
    """A worker process."""

    object: Literal["worker"] = "worker"
    host: str
    slots: int
    busy: int
    gpus: list[Any]
    versions: dict[str, Any]
    draining: bool
    alive: bool
    heartbeat_age_seconds: float
    started_at: datetime


@router.get("/v1/workers")
def read_all(session: SessionDep, _principal: ReadDep, settings: SettingsDep) -> Listing[WorkerOut]:
    """List the workers that were heard within the last day."""
    return listing(
        [
            WorkerOut(
                id=row.id, host=row.host, slots=row.slots, busy=row.busy, gpus=row.gpus, versions=row.versions,
                draining=row.draining, alive=age <= settings.lease_seconds,
                heartbeat_age_seconds=round(max(age, 0.0), 3), started_at=as_time(row.started_at),
            )
            for row, age in workers.every(session)
        ],
        has_more=False,
    )  # fmt: skip
