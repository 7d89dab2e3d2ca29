"""`/v1/keys` and `/v1/me`: who may call."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import AwareDatetime, ConfigDict, Field

from app.deps import AdminDep, OnceDep, PageDep, PrincipalDep, SessionDep
from app.domain.errors import Forbidden
from app.domain.spec import Name, Strict
from app.http.envelope import Deleted, Listing, Object, as_time, as_time_or_null, listing
from app.http.idempotency import Replayed
from app.store import keys, projects, tables
from app.store.ids import new_id
from app.store.keys import Principal, Scope

router = APIRouter(tags=["keys"])


class NewKey(Strict):
    """A key to make."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"name": "ci", "scopes": ["read", "write"]}]}
    )

    name: Name
    scopes: Annotated[
        list[Scope], Field(min_length=1, max_length=4, description="Only an operator's key may give `operator`.")
    ] = ["read", "write"]  # noqa: RUF012
    project: Annotated[
        str | None, Field(description="Another project's id; only with an operator's key.", max_length=64)
    ] = None
    expires_at: AwareDatetime | None = None


class KeyOut(Object):
    """A key, without its secret."""

    object: Literal["key"] = "key"
    name: str
    prefix: str
    scopes: list[Scope]
    project: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


class KeyMade(KeyOut):
    """A new key; `key` is shown this once."""

    key: str


class ProjectName(Object):
    """A project by id and name."""

    name: str


class Me(Object):
    """Who calls."""

    object: Literal["key"] = "key"
    name: str
    prefix: str
    scopes: list[Scope]
    project: ProjectName
    expires_at: datetime | None


ProjectQuery = Annotated[str | None, Query(max_length=64, description="Another project; operators only.")]


def _out(key: tables.Key) -> KeyOut:
    return KeyOut(
        id=key.id, name=key.name, prefix=key.prefix, scopes=key.scopes, project=key.project_id,
        created_at=as_time(key.created_at), expires_at=as_time_or_null(key.expires_at),
        last_used_at=as_time_or_null(key.last_used_at),
    )  # fmt: skip


def _project_for(principal: Principal, named: str | None) -> str:
    if named is None or named == principal.project_id:
        return principal.project_id
    if "operator" not in principal.scopes:
        raise Forbidden("Only a key with the scope operator may name another project.", required_scope="operator")
    return named


@router.post("/v1/keys", status_code=201)
def create(asked: NewKey, session: SessionDep, admin: AdminDep, once: OnceDep) -> KeyMade:
    """Make a key; its secret is in this answer and nowhere else."""
    project_id = _project_for(admin, asked.project)
    if "operator" in asked.scopes and "operator" not in admin.scopes:
        raise Forbidden("Only a key with the scope operator may give it.", required_scope="operator")
    try:
        once.begin(asked)
    except Replayed as replayed:
        assert once.key is not None
        replayed.body["key"] = keys.derived_secret(admin.secret, replayed.body["id"], once.key)
        raise
    projects.find(session, project_id)
    expires_at = asked.expires_at.timestamp() if asked.expires_at else None
    keys.check_expiry(session, expires_at)
    key_id = new_id("key")
    secret = keys.derived_secret(admin.secret, key_id, once.key) if once.key else keys.new_secret()
    key = keys.insert(
        session, id=key_id, project_id=project_id, name=asked.name, scopes=asked.scopes, secret=secret,
        expires_at=expires_at,
    )  # fmt: skip
    session.refresh(key)
    made = KeyMade(**_out(key).model_dump(), key=secret)
    return once.answer(made, location=f"/v1/keys/{key.id}", hide=frozenset({"key"}))


@router.get("/v1/keys")
def read_all(
    session: SessionDep, admin: AdminDep, page: PageDep, project: ProjectQuery = None
) -> Listing[KeyOut]:  # fmt: skip
    """List the keys of the project that work or have expired; revoked ones are gone."""
    rows, has_more = keys.read(session, _project_for(admin, project), page)
    return listing([_out(row) for row in rows], has_more)


@router.delete("/v1/keys/{key_id}")
def delete(
    key_id: Annotated[str, Path(description="`key_…`")],
    session: SessionDep,
    admin: AdminDep,
    project: ProjectQuery = None,
) -> Deleted:
    """Revoke a key, and the browser sessions that it opened, at once."""
    keys.revoke(session, key_id, _project_for(admin, project))
    return Deleted(id=key_id, object="key")


@router.get("/v1/me")
def me(session: SessionDep, principal: PrincipalDep) -> Me:
    """Say whose key this is and what it may do."""
    project = projects.find(session, principal.project_id)
    return Me(
        id=principal.key_id, name=principal.name, prefix=principal.prefix,
        scopes=[scope for scope in keys.SCOPES if scope in principal.scopes],
        project=ProjectName(id=project.id, name=project.name), expires_at=as_time_or_null(principal.expires_at),
    )  # fmt: skip
