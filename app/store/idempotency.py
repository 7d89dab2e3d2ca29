"""Stored answers to creating calls, by the caller's own key: the same call twice does its work once."""

from typing import Any

from sqlalchemy import CursorResult, delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.domain.errors import Conflict, Invalid
from app.store.clock import Now
from app.store.tables import Idempotency

LIFETIME_SECONDS = 24 * 3600.0
# A long call touches its row while it runs; a row untouched this long belongs to a process that died.
ABANDONED_SECONDS = 30.0

Slot = tuple[str, str, str]  # project, route, key


def begin(session: Session, slot: Slot, fingerprint: str) -> Idempotency | None:
    """Note a short call that runs in this very transaction; give the earlier row if it was answered before.

    A twin that runs at the same moment waits here for this transaction and then sees its answer.

    Raises:
        Conflict: a long call with this key is still running.
        Invalid: the key was used for another body.
    """
    earlier = reserve(session, slot, fingerprint)
    if earlier is not None:
        check(earlier, fingerprint)
    return earlier


def reserve(session: Session, slot: Slot, token: str) -> Idempotency | None:
    """Take the slot, or give the row of the call that was answered before.

    Raises:
        Conflict: the first call is still running.
    """
    session.execute(
        delete(Idempotency)
        .where(*_is(slot), _over())
        .execution_options(synchronize_session=False)
    )  # fmt: skip
    project_id, route, key = slot
    try:
        with session.begin_nested():
            session.add(Idempotency(project_id=project_id, route=route, key=key, fingerprint=token))
            session.flush()
    except IntegrityError:
        earlier = session.get(Idempotency, slot, with_for_update=True, populate_existing=True)
        if earlier is None or earlier.status is None:
            raise Conflict(
                "The first call with this Idempotency-Key is still running; ask again when it has answered.",
                code="idempotency_running",
            ) from None
        return earlier
    return None


def check(earlier: Idempotency, fingerprint: str) -> None:
    """Refuse a key that was used for another body."""
    if earlier.fingerprint != fingerprint:
        raise Invalid(
            "This Idempotency-Key was used for another body; use a new key for a new request.",
            code="idempotency_mismatch", param="Idempotency-Key",
        )  # fmt: skip


def touch(session: Session, slot: Slot, token: str) -> None:
    """Say that a long call is still running."""
    session.execute(update(Idempotency).where(*_is(slot), *_mine(token)).values(created_at=Now()))


def finish(
    session: Session, slot: Slot, token: str, *, fingerprint: str, status: int, body: Any, headers: dict[str, str]
) -> None:
    """Store the answer in the transaction that did the work.

    Raises:
        Conflict: another call took the slot over, because this one seemed dead.
    """
    stored: Any = session.execute(
        update(Idempotency)
        .where(*_is(slot), *_mine(token))
        .values(fingerprint=fingerprint, status=status, body=body, headers=headers, created_at=Now())
    )
    assert isinstance(stored, CursorResult)
    if stored.rowcount != 1:
        raise Conflict("Another call with this Idempotency-Key took over; ask again.", code="idempotency_running")


def drop(session: Session, slot: Slot, token: str) -> None:
    """Forget a long call that failed, so that it can be tried again."""
    session.execute(delete(Idempotency).where(*_is(slot), *_mine(token)))


def _is(slot: Slot) -> tuple[Any, ...]:
    project_id, route, key = slot
    return Idempotency.project_id == project_id, Idempotency.route == route, Idempotency.key == key


def _mine(token: str) -> tuple[Any, ...]:
    return Idempotency.status.is_(None), Idempotency.fingerprint == token


def _over() -> Any:
    expired = Idempotency.created_at < Now() - LIFETIME_SECONDS
    abandoned = Idempotency.status.is_(None) & (Idempotency.created_at < Now() - ABANDONED_SECONDS)
    return expired | abandoned
