"""API keys and the browser sessions that hang on them. A secret is never stored: only its prefix and its SHA-256."""

import hashlib
import hmac
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from app.domain.errors import Conflict, Invalid, NotFound
from app.store import page, tables
from app.store.clock import Now
from app.store.ids import new_id

Scope = Literal["read", "write", "admin", "operator"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin", "operator")

SESSION_SECONDS = 7 * 24 * 3600.0
PREFIX_LENGTH = 11  # of "ty_…": enough to recognise a key in a list, 40 random characters stay secret
_ALPHABET = string.ascii_letters + string.digits
_USED_SECONDS = 60.0  # `last_used_at` is that exact, so that reading costs no write


@dataclass(frozen=True)
class Principal:
    """Who calls: a key, its project and its scopes. `secret` is what was sent, kept for this request only."""

    key_id: str
    name: str
    prefix: str
    project_id: str
    scopes: frozenset[str]
    expires_at: float | None
    by_cookie: bool
    stale: bool = field(repr=False)  # its `last_used_at` is due
    secret: str = field(repr=False)


def new_secret() -> str:
    """Make a key that nobody can guess: `ty_` and 43 characters, 256 bits."""
    return "ty_" + "".join(secrets.choice(_ALPHABET) for _ in range(43))


def derived_secret(creator_secret: str, key_id: str, idempotency_key: str) -> str:
    """Make the secret of a new key from its creator's, so that the replay of a creating call can show it again.

    Nothing that is stored is enough to compute it: the creator's own secret is not.
    """
    digest = hmac.new(creator_secret.encode(), f"key\n{key_id}\n{idempotency_key}".encode(), hashlib.sha256).digest()
    number = int.from_bytes(digest, "big")
    characters: list[str] = []
    for _ in range(43):
        number, index = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[index])
    return "ty_" + "".join(characters)


def digest(secret: str) -> str:
    """Hash a secret for storage; it is long and random, so one round is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def insert(
    session: Session,
    *,
    project_id: str,
    name: str,
    scopes: Sequence[str],
    secret: str,
    expires_at: float | None = None,
    id: str | None = None,
) -> tables.Key:
    """Insert a key."""
    key = tables.Key(
        id=id or new_id("key"), project_id=project_id, name=name, prefix=secret[:PREFIX_LENGTH], sha256=digest(secret),
        scopes=[scope for scope in SCOPES if scope in scopes], expires_at=expires_at,
    )  # fmt: skip
    session.add(key)
    session.flush()
    return key


def authenticate(session: Session, secret: str) -> Principal | None:
    """Find who sent this key."""
    row = session.execute(
        select(tables.Key, Now())
        .join(tables.Project, tables.Project.id == tables.Key.project_id)
        .where(tables.Key.sha256 == digest(secret), *_valid())
    ).one_or_none()
    if row is None or not hmac.compare_digest(row[0].sha256, digest(secret)):
        return None
    return _principal(row[0], row[1], secret, by_cookie=False)


def authenticate_session(session: Session, token: str) -> Principal | None:
    """Find whose browser sent this cookie; it ends with the key that opened it."""
    row = session.execute(
        select(tables.Key, Now(), tables.Session.sha256)
        .join(tables.Session, tables.Session.key_id == tables.Key.id)
        .join(tables.Project, tables.Project.id == tables.Key.project_id)
        .where(tables.Session.sha256 == digest(token), tables.Session.expires_at > Now(), *_valid())
    ).one_or_none()
    if row is None or not hmac.compare_digest(row[2], digest(token)):
        return None
    return _principal(row[0], row[1], token, by_cookie=True)


def _valid() -> tuple[ColumnElement[bool], ...]:
    return (
        tables.Key.revoked_at.is_(None),
        tables.Key.expires_at.is_(None) | (tables.Key.expires_at > Now()),
        tables.Project.deleted_at.is_(None),
    )


def _principal(key: tables.Key, now: float, secret: str, *, by_cookie: bool) -> Principal:
    return Principal(
        key_id=key.id, name=key.name, prefix=key.prefix, project_id=key.project_id, scopes=frozenset(key.scopes),
        expires_at=key.expires_at, by_cookie=by_cookie,
        stale=key.last_used_at is None or now - key.last_used_at > _USED_SECONDS, secret=secret,
    )  # fmt: skip


def touch(session: Session, key_id: str) -> None:
    """Note that a key was used."""
    session.execute(update(tables.Key).where(tables.Key.id == key_id).values(last_used_at=Now()))


def check_expiry(session: Session, expires_at: float | None) -> None:
    """Refuse a key that would be born dead."""
    if expires_at is not None and expires_at <= session.scalars(select(Now())).one():
        raise Invalid("expires_at: Give a time in the future.", param="expires_at")


def read(session: Session, project_id: str, wanted: page.Page) -> tuple[list[tables.Key], bool]:
    """List the keys of a project that are not revoked."""
    query = select(tables.Key).where(tables.Key.project_id == project_id, tables.Key.revoked_at.is_(None))
    return page.read(session, query, tables.Key.id, wanted)


def revoke(session: Session, key_id: str, project_id: str) -> tables.Key:
    """End a key and its sessions.

    Raises:
        NotFound: there is no such key in this project.
        Conflict: it is the last one with the scope `operator`, so nobody could make another.
    """
    key = session.scalar(
        select(tables.Key)
        .where(tables.Key.id == key_id, tables.Key.project_id == project_id, tables.Key.revoked_at.is_(None))
        .with_for_update()
    )
    if key is None:
        raise NotFound()
    if "operator" in key.scopes and _operators(session, but=key.id) == 0:
        raise Conflict(
            "This is the last key with the scope operator; make another one first.", code="last_operator_key"
        )  # fmt: skip
    _end(session, key)
    return key


def _operators(session: Session, *, but: str) -> int:
    living = session.execute(
        select(tables.Key.scopes)
        .join(tables.Project, tables.Project.id == tables.Key.project_id)
        .where(tables.Key.id != but, *_valid())
    )
    return sum("operator" in scopes for (scopes,) in living)


def _end(session: Session, key: tables.Key) -> None:
    session.execute(update(tables.Key).where(tables.Key.id == key.id).values(revoked_at=Now()))
    session.execute(delete(tables.Session).where(tables.Session.key_id == key.id))


def open_session(session: Session, key_id: str) -> tuple[tables.Session, str]:
    """Open a browser session; gives its row and the cookie's value."""
    token = "tys_" + secrets.token_urlsafe(32)
    opened = tables.Session(
        id=new_id("ses"), key_id=key_id, sha256=digest(token), expires_at=Now() + SESSION_SECONDS
    )  # fmt: skip
    session.add(opened)
    session.flush()
    session.refresh(opened)
    return opened, token


def close_session(session: Session, token: str, key_id: str) -> str | None:
    """End a browser session of this key; gives its id, or None when it has ended already."""
    return session.scalar(
        delete(tables.Session)
        .where(tables.Session.sha256 == digest(token), tables.Session.key_id == key_id)
        .returning(tables.Session.id)
    )


def any_key(session: Session) -> bool:
    """Say whether a key was ever made that still works."""
    query = select(func.count()).select_from(tables.Key).join(tables.Project).where(*_valid())
    return bool(session.scalar(query))


def register_operator(session: Session, project_id: str, secret: str, name: str) -> None:
    """Make exactly this secret the operator's key of that name; an earlier one of that name ends."""
    earlier = session.scalars(
        select(tables.Key).where(
            tables.Key.project_id == project_id, tables.Key.name == name, tables.Key.sha256 != digest(secret),
            tables.Key.revoked_at.is_(None),
        )
    ).all()  # fmt: skip
    for key in earlier:
        _end(session, key)
    if session.scalar(select(tables.Key.id).where(tables.Key.sha256 == digest(secret))) is None:
        insert(session, project_id=project_id, name=name, scopes=SCOPES, secret=secret)
