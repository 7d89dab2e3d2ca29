"""`Idempotency-Key` on creating calls: short ones within their own transaction, uploads around it."""

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

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


@dataclass(frozen=True)
class Reservation:
    """A long creating call, whose fingerprint is known only at its end. `earlier` is its answer of an earlier time."""

    slot: idempotency.Slot
    token: str
    earlier: Idempotency | None

    @classmethod
    def take(cls, session: Session, *, project_id: str, route: str, key: str) -> "Reservation":
        """Reserve the key, in a transaction of its own.

        Raises:
            Conflict: the first call is still running.
        """
        slot, token = (project_id, route, key), secrets.token_hex(32)
        return cls(slot, token, idempotency.reserve(session, slot, token))

    def compare(self, asked: str) -> None:
        """Give the earlier answer, now that the fingerprint is known.

        Raises:
            Replayed: this was answered before.
            Invalid: the key was used for another body.
        """
        if self.earlier is not None:
            idempotency.check(self.earlier, asked)
            raise Replayed(self.earlier)

    def touch(self, session: Session) -> None:
        """Say that the call still runs."""
        idempotency.touch(session, self.slot, self.token)

    def finish(self, session: Session, *, asked: str, status: int, body: Any, headers: dict[str, str]) -> None:
        """Store the answer in the transaction that did the work."""
        idempotency.finish(
            session, self.slot, self.token, fingerprint=asked, status=status, body=body, headers=headers
        )  # fmt: skip

    def drop(self, session: Session) -> None:
        """Free the key after a failure."""
        if self.earlier is None:
            idempotency.drop(session, self.slot, self.token)
