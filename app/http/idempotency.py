"""`Idempotency-Key` on creating calls: short ones within their own transaction, uploads around it."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import Response
from pydantic import BaseModel
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.database import Database
from app.store import idempotency
from app.store.tables import Idempotency

Answer = TypeVar("Answer", bound=BaseModel)


class Replayed(Exception):
    """The call was answered before; the handler gives that answer again."""

    def __init__(self, earlier: Idempotency) -> None:
        assert earlier.status is not None
        self.status, self.body, self.headers = earlier.status, earlier.body or {}, earlier.headers or {}
        super().__init__("replayed")


def fingerprint(value: Any) -> str:
    """Hash what was asked, whatever the order of its fields."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Once:
    """One short creating call. A route says `begin(body)` before its work and `answer(…)` after it."""

    def __init__(
        self, session: Session, response: Response, *, project_id: str, route: str, key: str | None, status: int
    ) -> None:
        self._session, self._response, self._status = session, response, status
        self._slot: idempotency.Slot | None = (project_id, route, key) if key else None
        self._fingerprint = ""

    @property
    def key(self) -> str | None:
        """The caller's key, if one was sent."""
        return self._slot[2] if self._slot else None

    def begin(self, asked: BaseModel | dict[str, Any] | None = None) -> None:
        """Note the call.

        Raises:
            Replayed: the same call was answered before.
            Conflict: it is still running.
            Invalid: the key was used for another body.
        """
        if self._slot is None:
            return
        value = asked.model_dump(mode="json") if isinstance(asked, BaseModel) else asked
        self._fingerprint = fingerprint(value)
        earlier = idempotency.begin(self._session, self._slot, self._fingerprint)
        if earlier is not None:
            raise Replayed(earlier)

    def answer(
        self, made: Answer, *, location: str, hide: frozenset[str] = frozenset(), status: int | None = None
    ) -> Answer:
        """Set `Location` and store the answer, but for the fields in `hide`, in the transaction of what was made.

        `status` is given where it is not the route's usual one.
        """
        headers = {"Location": location}
        self._response.headers.update(headers)
        if self._slot is not None:
            body = {
                name: None if name in hide else value
                for name, value in made.model_dump(mode="json", by_alias=True).items()
            }
            idempotency.finish(
                self._session, self._slot, self._fingerprint, fingerprint=self._fingerprint,
                status=status or self._status, body=body, headers=headers,
            )  # fmt: skip
        return made


class Reservation:
    """One long creating call, such as an upload, whose fingerprint is known only at its end."""

    def __init__(self, slot: idempotency.Slot | None, token: str, earlier: Idempotency | None) -> None:
        self._slot, self._token, self._earlier = slot, token, earlier

    def compare(self, asked: str) -> None:
        """Give the earlier answer, if there is one, now that the fingerprint is known.

        Raises:
            Replayed: this was answered before.
            Invalid: the key was used for another body.
        """
        if self._earlier is not None:
            idempotency.check(self._earlier, asked)
            raise Replayed(self._earlier)

    def answer(
        self, session: Session, response: Response, made: Answer, *, asked: str, status: int, location: str
    ) -> Answer:
        """Set `Location` and store the answer in the transaction that did the work."""
        headers = {"Location": location}
        response.headers.update(headers)
        if self._slot is not None:
            idempotency.finish(
                session, self._slot, self._token, fingerprint=asked, status=status,
                body=made.model_dump(mode="json", by_alias=True), headers=headers,
            )  # fmt: skip
        return made


@asynccontextmanager
async def reserved(database: Database, *, project_id: str, route: str, key: str | None) -> AsyncIterator[Reservation]:
    """Hold an Idempotency-Key while a long call runs; a failure frees it, so that the call can be tried again.

    Raises:
        Conflict: the first call with this key is still running.
    """
    if key is None:
        yield Reservation(None, "", None)
        return
    slot, token = (project_id, route, key), secrets.token_hex(32)
    earlier = await database.run(lambda session: idempotency.reserve(session, slot, token))
    if earlier is not None:
        yield Reservation(slot, token, earlier)
        return
    alive = asyncio.create_task(_stay_alive(database, slot, token))
    try:
        yield Reservation(slot, token, None)
    finally:
        alive.cancel()
        # After success there is nothing left to drop: the row has its answer.
        await asyncio.shield(database.run(lambda session: idempotency.drop(session, slot, token)))


async def _stay_alive(database: Database, slot: idempotency.Slot, token: str) -> None:
    while True:
        await asyncio.sleep(idempotency.ABANDONED_SECONDS / 3)
        with suppress(OperationalError):  # a busy database; there are two more tries before anybody takes over
            await database.run(lambda session: idempotency.touch(session, slot, token))
