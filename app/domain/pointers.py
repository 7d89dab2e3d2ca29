"""What a JSON value lacks against a schema, said as JSON pointers (RFC 6901) with the correction. Pure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError as SchemaError
from pydantic import ValidationError

from app.domain.errors import Detail

Json = dict[str, Any]


def pointer(path: Iterable[str | int]) -> str:
    """Write a path as a JSON pointer: `("model", "a/b")` is `/model/a~1b`."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def not_finite(value: Any, path: tuple[str | int, ...] = ()) -> list[Detail]:
    """Find every number that is not finite: Python reads `NaN` and `1e999` from JSON, and no limit refuses a NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return [Detail(pointer=pointer(path), message="Give a finite number.")]
    children: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        children = cast(dict[str, Any], value).items()
    elif isinstance(value, list):
        children = enumerate(cast(list[Any], value))
    return [detail for key, item in children for detail in not_finite(item, (*path, key))]


def schema_details(schema: Mapping[str, Any], value: Any, *, also_known: Iterable[str] = ()) -> list[Detail]:
    """Check `value` against a JSON Schema; `also_known` are top-level names worth suggesting beside the schema's."""
    validator: Any = Draft202012Validator(cast(Any, schema))
    found: list[Detail] = []
    for error in cast(Iterable[SchemaError], validator.iter_errors(value)):
        for detail in _explain(error, tuple(also_known)):
            if detail not in found:
                found.append(detail)
    return sorted(found, key=lambda detail: detail.pointer)


def _explain(error: Any, also_known: Sequence[str]) -> Iterable[Detail]:
    path: list[str | int] = list(error.absolute_path)
    match error.validator:
        case "additionalProperties":
            known: list[str] = list(error.schema.get("properties", {}))
            for name in sorted(set[str](error.instance) - set(known)):
                yield Detail(
                    pointer=pointer([*path, name]), message=_unknown_field(name, known, also_known if not path else ())
                )
        case "required":
            for name in error.validator_value:
                if name not in error.instance:
                    yield Detail(pointer=pointer([*path, name]), message="This field is required.")
        case "anyOf" | "oneOf" if error.context:
            yield from _explain_alternatives(error, also_known)
        case "enum" | "const":
            allowed = ", ".join(map(_shown, _choices(error)))
            message = f"{_shown(error.instance)} is not one of {allowed}.{_close(error.instance, _choices(error))}"
            yield Detail(pointer=pointer(path), message=message)
        case "type":
            message = f"{_shown(error.instance)} is not {_kinds(error.validator_value)}."
            yield Detail(pointer=pointer(path), message=message)
        case "pattern":
            meaning = error.schema.get("description")
            hint = f" Expected: {meaning}" if meaning else ""
            message = f"{_shown(error.instance)} does not match {error.validator_value}.{hint}"
            yield Detail(pointer=pointer(path), message=message)
        case "minItems" | "maxItems" | "minLength" | "maxLength":
            yield Detail(pointer=pointer(path), message=_other_length(error))
        case _:
            yield Detail(pointer=pointer(path), message=f"{_shorten(error.message)}.")


def _explain_alternatives(error: Any, also_known: Sequence[str]) -> Iterable[Detail]:
    """Explain the one alternative that was meant: the one whose kind of value this is."""
    branches: dict[int, list[Any]] = {}
    for below in error.context:
        branches.setdefault(below.schema_path[0], []).append(below)
    depth = len(error.absolute_path)
    meant = [
        errors for errors in branches.values()
        if not any(len(below.absolute_path) == depth and _is_of_another_kind(below) for below in errors)
    ]  # fmt: skip
    if len(meant) == 1 and not (len(branches) > 1 and _is_choice(meant[0])):
        for below in meant[0]:
            yield from _explain(below, also_known)
        return
    wanted: list[str] = []
    choices: list[Any] = []
    for first, *_ in branches.values():
        if first.validator == "type":
            wanted.append(_kinds(first.validator_value))
        elif first.validator in ("enum", "const"):
            choices += _choices(first)
        else:
            wanted.append(_shorten(str(first.message)))
    shown = " or ".join(dict.fromkeys([*map(_shown, choices), *wanted]))
    message = f"{_shown(error.instance)} is not {shown}.{_close(error.instance, choices)}"
    yield Detail(pointer=pointer(error.absolute_path), message=message)


def _is_choice(errors: Sequence[Any]) -> bool:
    return all(error.validator in ("enum", "const") and not error.path for error in errors)


def _is_of_another_kind(error: Any) -> bool:
    if error.validator in ("enum", "const"):
        return not any(type(item) is type(error.instance) for item in _choices(error))
    return error.validator == "type"


def _kinds(kind: Any) -> str:
    names = [kind] if isinstance(kind, str) else list(kind)
    words = {"integer": "an integer", "object": "an object", "array": "an array", "null": "null"}
    return " or ".join(words.get(name, f"a {name}") for name in names)


def _other_length(error: Any) -> str:
    kind, wanted, given = str(error.validator), int(error.validator_value), len(error.instance)
    thing = "item" if kind.endswith("Items") else "character"
    bound = "at least" if kind.startswith("min") else "at most"
    return f"Give {bound} {wanted} {thing}{'' if wanted == 1 else 's'}, not {given}."


def _unknown_field(name: str, known: Sequence[str], also_known: Sequence[str]) -> str:
    close = get_close_matches(name, [*known, *also_known], n=3, cutoff=0.5)
    if close:
        return f"Unknown field; did you mean {' or '.join(close)}?"
    return f"Unknown field; known here: {', '.join(sorted(known)) or 'none'}."


def _choices(error: Any) -> list[Any]:
    return list(error.validator_value) if error.validator == "enum" else [error.validator_value]


def _close(value: Any, allowed: Sequence[Any]) -> str:
    names = [item for item in allowed if isinstance(item, str)]
    close = get_close_matches(value, names, n=2, cutoff=0.5) if isinstance(value, str) else []
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _shown(value: Any) -> str:
    return _shorten(json.dumps(value, ensure_ascii=False))


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def validation_details(error: ValidationError, value: Any) -> list[Detail]:
    """Turn pydantic's errors about `value` into details."""
    found: list[Detail] = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = sent_pointer(item["loc"], value, missing=item["type"] == "missing")
        detail = Detail(pointer=where, message=f"{item['msg']}.")
        if detail not in found:
            found.append(detail)
    return found


def sent_pointer(location: Sequence[str | int], value: Any, *, missing: bool) -> str:
    """Point into what was sent: pydantic also puts the names of union branches into its path, which nobody sent.

    The last part of the path to a `missing` field is not there either, but is what the reader wants to know.
    """
    path: list[str | int] = []
    for number, part in enumerate(location, start=1):
        is_key = isinstance(value, dict) and part in value
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(cast(list[Any], value))
        if is_key or is_index:
            value = cast(Any, value)[part]
            path.append(part)
        elif missing and number == len(location):
            path.append(part)
    return pointer(path)


def schema_defaults(schema: Mapping[str, Any], value: Mapping[str, Any], name: str) -> Json:
    """Fill the defaults that property `name` of `schema` declares into `value`, nested objects included."""
    described: Mapping[str, Any] = schema.get("properties", {}).get(name, {})
    return _filled(described, value, schema)


def _filled(described: Mapping[str, Any], value: Mapping[str, Any], root: Mapping[str, Any]) -> Json:
    filled = dict(value)
    for key, below in cast(Mapping[str, Any], followed(described, root).get("properties", {})).items():
        if key not in filled and "default" in below:
            filled[key] = below["default"]
        if isinstance(filled.get(key), dict):
            filled[key] = _filled(below, filled[key], root)
    return filled


def followed(described: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a `$ref` into the document's `$defs`; pydantic writes no other kind."""
    name = str(described.get("$ref", ""))
    if not name.startswith("#/$defs/"):
        return described
    return root.get("$defs", {}).get(name.removeprefix("#/$defs/"), {})
