"""`/docs`: the OpenAPI document as one plain page, without scripts and without anything from another host."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(tags=["service"], include_in_schema=False)
Json = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
details { border: 1px solid #ccc; border-radius: 4px; margin: .4rem 0; padding: .4rem .8rem }
summary { cursor: pointer } code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto } b { display: inline-block; min-width: 4.5rem }
table { border-collapse: collapse } td { padding: .1rem .8rem .1rem 0; vertical-align: top }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd } pre { background: #222 } }
"""
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """Show every call with its parameters, its body and an example."""
    document: Json = request.app.openapi()
    return HTMLResponse("".join(_page(document, str(request.base_url).rstrip("/"))), headers=_HEADERS)


def _page(document: Json, base: str) -> Iterator[str]:
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1><p>{escape(document['info'].get('summary', ''))} The document itself is "
    yield '<a href="/openapi.json">/openapi.json</a>. Send <code>Authorization: Bearer ty_…</code> with every call.</p>'
    by_tag: dict[str, list[tuple[str, str, Json]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation.get("tags", ["service"])[0], []).append((method.upper(), path, operation))
    for tag, operations in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        for method, path, operation in operations:
            yield from _operation(document, base, method, path, operation)
    yield "</html>"


def _operation(document: Json, base: str, method: str, path: str, operation: Json) -> Iterator[str]:
    scopes = [scope for way in operation.get("security", []) for scope in way.get("key", [])]
    needs = f"scope {', '.join(scopes)}" if scopes else "any key" if operation.get("security") else "open"
    yield f"<details><summary><b>{method}</b> <code>{escape(path)}</code> <small>({escape(needs)})</small></summary>"
    yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p><table>"
    for parameter in operation.get("parameters", []):
        name, where = escape(parameter["name"]), escape(parameter["in"])
        text = escape(parameter.get("description", ""))
        yield f"<tr><td><code>{name}</code><td>{where}<td>{text}"
    yield "</table>"
    content = operation.get("requestBody", {}).get("content", {})
    yield f"<pre>{escape(curl(document, base, method, path, content))}</pre>"
    for media_type, body in content.items():
        yield f"<p>{escape(media_type)}</p><pre>{escape(_pretty(document, body['schema']))}</pre>"
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            for media_type, body in answer.get("content", {}).items():
                schema = _pretty(document, body.get("schema", {}))
                yield f"<p>{status} {escape(media_type)}</p><pre>{escape(schema)}</pre>"
    yield "</details>"


def curl(document: Json, base: str, method: str, path: str, content: Json) -> str:
    """Write an example call; its body is the first example that the schema carries."""
    command = f"curl -X {method} {base}{path} -H 'Authorization: Bearer '$TUNEYARD_KEY"
    schema = resolve(document, content.get("application/json", {}).get("schema", {}))
    if "multipart/form-data" in content:
        command += " -F name=cats -F file=@cats.zip"
    elif schema.get("examples"):
        command += f" --json '{json.dumps(schema['examples'][0])}'"
    return command


def resolve(document: Json, schema: Json) -> Json:
    """Follow a `$ref` into the components."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return schema


def _pretty(document: Json, schema: Json) -> str:
    """Write a schema as the JSON that fits it, types in the place of values, two levels deep."""
    return json.dumps(_shape(document, schema, depth=3), indent=1, ensure_ascii=False)


def _shape(document: Json, schema: Json, depth: int) -> Any:
    schema = resolve(document, schema)
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives:
        return " | ".join(
            shape if isinstance(shape, str) else json.dumps(shape, ensure_ascii=False)
            for shape in (_shape(document, alternative, depth - 1) for alternative in alternatives)
        )
    if "const" in schema or "enum" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("properties") and depth > 0:
        return {name: _shape(document, below, depth - 1) for name, below in schema["properties"].items()}
    if schema.get("type") == "array" and depth > 0:
        return [_shape(document, schema.get("items", {}), depth - 1)]
    return str(schema.get("format") or schema.get("type") or "any")
