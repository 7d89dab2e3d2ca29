"""`?wait=`: a read that may wait until what it reads has changed."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from fastapi import Depends, Query, Request
from sqlalchemy.orm import Session

from app.database import Database
from app.deps import DatabaseDep, NotifierDep, ReadDep, SettingsDep
from app.http.notifier import Kind, Notifier
from app.store.keys import Principal


class HasStatus(Protocol):
    """What may be waited for."""

    @property
    def status(self) -> str: ...


Seen = TypeVar("Seen", bound=HasStatus)


@dataclass(frozen=True)
class Patience:
    """A caller who has so many seconds for an object to change its status."""

    request: Request
    principal: Principal
    database: Database
    notifier: Notifier
    seconds: float

    async def look(self, read: Callable[[Session], Seen], *, kind: Kind, id: str, ended: Container[str]) -> Seen:
        """Read an object; while there is time and its status is not one of `ended`, wait for another and read again.

        Raises:
            TooManyRequests: the key has as many streams and long polls open as it may.
        """
        found = await self.database.run(read, read_only=True)
        if self.seconds <= 0 or found.status in ended:
            return found
        leave = self.notifier.enter(self.principal.key_id)
        try:
            await self.notifier.change(
                kind, id, since=found.status, timeout=self.seconds, gone=self.request.is_disconnected
            )
        finally:
            leave()
        return await self.database.run(read, read_only=True)


async def _patience(
    request: Request,
    principal: ReadDep,
    database: DatabaseDep,
    notifier: NotifierDep,
    settings: SettingsDep,
    wait: Annotated[
        float, Query(ge=0, le=3600, allow_inf_nan=False, description="Wait up to this many seconds for a change.")
    ] = 0,
) -> Patience:
    return Patience(request, principal, database, notifier, min(wait, settings.max_wait_seconds))


PatienceDep = Annotated[Patience, Depends(_patience)]
