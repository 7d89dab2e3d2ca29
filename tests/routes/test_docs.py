"""The documentation: open, complete, self-contained, and its examples work."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.routes.conftest import Caller

pytestmark = pytest.mark.routes


def test_the_page_shows_every_call_and_loads_nothing(anonymous: httpx.Client) -> None:
    page = anonymous.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text.lower()
    assert not re.search(r'(src|href)="(https?:)?//', page.text)
    for path in anonymous.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in page.text


def test_every_example_works(anonymous: httpx.Client, make_caller: Callable[..., Caller]) -> None:
    caller = make_caller("read", "write", "admin", "operator")
    document: dict[str, Any] = anonymous.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in schema:
                schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
            if "{" in path:
                continue
            for example in schema.get("examples", []):
                # Names are taken for good, and generated requests of other tests begin with the examples.
                own = {"name": f"{example['name']} {caller.project}"} if "name" in example else {}
                answer = caller.http.request(method, path, json={**example, **own})
                assert answer.status_code in (201, 202), f"{method} {path} {example}: {answer.text}"
                tried += 1
    assert tried >= 3


def test_every_answer_is_described(anonymous: httpx.Client) -> None:
    document = anonymous.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            successes = [answer for status, answer in operation["responses"].items() if status.startswith("2")]
            assert successes, f"{method} {path}"
            for answer in successes:
                json_answer = answer.get("content", {}).get("application/json")
                assert json_answer is None or json_answer["schema"], f"declare the response model of {method} {path}"
            assert operation["responses"]["422"]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/ErrorBody"
            }
