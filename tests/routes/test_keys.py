"""Keys: made with scopes, listed without their secret, revoked at once; `/v1/me` says whose they are."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import Engine, text

from app.store import tables
from app.store.session import transaction
from tests.routes.conftest import Caller, Service, assert_error

pytestmark = pytest.mark.routes
MakeCaller = Callable[..., Caller]


def client_of(service: Service, secret: str) -> httpx.Client:
    return httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {secret}"}, trust_env=False)


def test_make_use_list_revoke(caller: Caller, service: Service) -> None:
    made = caller.http.post("/v1/keys", json={"name": "ci", "scopes": ["write", "read"]})
    assert made.status_code == 201
    key = made.json()
    assert key["key"].startswith(key["prefix"])
    assert len(key["key"]) >= 40
    assert (key["object"], key["scopes"], key["project"]) == ("key", ["read", "write"], caller.project)
    with client_of(service, key["key"]) as http:
        me = http.get("/v1/me").json()
        assert (me["id"], me["scopes"], me["project"]["id"]) == (key["id"], ["read", "write"], caller.project)
        listed = caller.http.get("/v1/keys").json()["data"]
        shown = next(item for item in listed if item["id"] == key["id"])
        assert shown["last_used_at"] is not None
        assert set(shown) == set(key) - {"key"}
        assert key["key"] not in json.dumps(listed)
        answer = caller.http.delete(f"/v1/keys/{key['id']}")
        assert answer.json() == {"id": key["id"], "object": "key", "deleted": True}
        assert_error(http.get("/v1/me"), 401, "unauthenticated")
    assert key["id"] not in [item["id"] for item in caller.http.get("/v1/keys").json()["data"]]
    assert_error(caller.http.delete(f"/v1/keys/{key['id']}"), 404)


def test_a_key_ends_when_it_expires(caller: Caller, service: Service, engine: Engine) -> None:
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    key = caller.http.post("/v1/keys", json={"name": "short", "expires_at": soon}).json()
    with client_of(service, key["key"]) as http:
        assert http.get("/v1/me").json()["expires_at"] == key["expires_at"]
        with transaction(engine) as session:
            session.get_one(tables.Key, key["id"]).expires_at = 1.0
        assert_error(http.get("/v1/me"), 401)
    past = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    assert_error(caller.http.post("/v1/keys", json={"name": "late", "expires_at": past}), 422)
    assert_error(caller.http.post("/v1/keys", json={"name": "zoneless", "expires_at": "2030-01-01T00:00:00"}), 422)


def test_only_operators_reach_over_the_wall(make_caller: MakeCaller) -> None:
    admin, other, operator = make_caller("admin"), make_caller("read"), make_caller("operator", "admin")
    body = {"name": "x", "project": other.project}
    assert assert_error(admin.http.post("/v1/keys", json=body), 403)["required_scope"] == "operator"
    assert_error(admin.http.get("/v1/keys", params={"project": other.project}), 403)
    assert_error(admin.http.post("/v1/keys", json={"name": "x", "scopes": ["operator"]}), 403)
    made = operator.http.post("/v1/keys", json=body).json()
    assert made["project"] == other.project
    assert_error(admin.http.delete(f"/v1/keys/{made['id']}"), 404)
    assert_error(operator.http.delete(f"/v1/keys/{made['id']}"), 404)
    listed = operator.http.get("/v1/keys", params={"project": other.project}).json()["data"]
    assert made["id"] in [item["id"] for item in listed]
    assert operator.http.delete(f"/v1/keys/{made['id']}", params={"project": other.project}).status_code == 200
    assert_error(operator.http.post("/v1/keys", json={"name": "x", "project": "prj_nobody"}), 404)


@pytest.mark.parametrize("scopes", [[], ["sudo"], "read", ["read"] * 5])
def test_bad_scopes(caller: Caller, scopes: object) -> None:
    error = assert_error(caller.http.post("/v1/keys", json={"name": "x", "scopes": scopes}), 422)
    assert error["details"][0]["pointer"].startswith("/scopes")


def test_a_replay_shows_the_secret_again_although_it_is_stored_nowhere(
    caller: Caller, service: Service, engine: Engine
) -> None:  # fmt: skip
    headers = {"Idempotency-Key": "once-" + caller.project}
    first = caller.http.post("/v1/keys", json={"name": "ci"}, headers=headers)
    again = caller.http.post("/v1/keys", json={"name": "ci"}, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    secret = first.json()["key"]
    with client_of(service, secret) as http:
        assert http.get("/v1/me").status_code == 200
    with transaction(engine, read_only=True) as session:
        for table in tables.Base.metadata.sorted_tables:
            for row in session.execute(text(f"select * from {table.name}")):
                assert secret not in str(row), table.name
                assert caller.key not in str(row), table.name


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic abc", "Bearer ty_", "Bearer ty_wrong", "bearer x y"],
)
def test_wrong_keys(anonymous: httpx.Client, header: str) -> None:
    answer = anonymous.get("/v1/me", headers={"Authorization": header})
    assert_error(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"
