"""What a JSON value lacks against a schema, by pointer and with the correction."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.domain.pointers import not_finite, pointer, schema_defaults, schema_details, validation_details

pytestmark = pytest.mark.unit

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["recipe"],
    "properties": {
        "recipe": {"type": "string"},
        "epochs": {"type": "integer", "minimum": 1, "default": 10},
        "batch_size": {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto", "type": "string"}]},
        "schedule": {"enum": ["cosine", "constant"], "default": "cosine"},
        "optimizer": {
            "anyOf": [{"$ref": "#/$defs/Optimizer"}, {"enum": ["sgd", "adamw"], "type": "string"}, {"type": "null"}]
        },
        "nested": {"$ref": "#/$defs/Optimizer"},
        "methods": {"type": "array", "minItems": 2, "maxItems": 3},
        "name": {"type": "string", "minLength": 1},
    },
    "$defs": {
        "Optimizer": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"momentum": {"type": "number", "maximum": 1, "default": 0.9}},
        }
    },
}


@pytest.mark.parametrize(
    ("change", "at", "says"),
    [
        ({"epochs": 0}, "/epochs", "0 is less than the minimum of 1"),
        ({"epochs": "ten"}, "/epochs", '"ten" is not an integer.'),
        ({"epoch": 3}, "/epoch", "did you mean epochs?"),
        ({"zzzzzz": 3}, "/zzzzzz", "known here: batch_size, epochs"),
        ({"schedule": "cosin"}, "/schedule", "Did you mean cosine?"),
        ({"batch_size": 0}, "/batch_size", "0 is less than the minimum of 1"),
        ({"batch_size": 1.5}, "/batch_size", '1.5 is not "auto" or an integer.'),
        ({"optimizer": {"momentum": 2}}, "/optimizer/momentum", "2 is greater than the maximum of 1"),
        ({"optimizer": {"momentun": 0.5}}, "/optimizer/momentun", "did you mean momentum?"),
        ({"optimizer": "adamv"}, "/optimizer", "Did you mean adamw?"),
        ({"batch_size": "big"}, "/batch_size", '"big" is not "auto" or an integer.'),
        ({"methods": ["simclr"]}, "/methods", "Give at least 2 items, not 1."),
        ({"methods": [1, 2, 3, 4]}, "/methods", "Give at most 3 items, not 4."),
        ({"name": ""}, "/name", "Give at least 1 character, not 0."),
        ({"recipe": None}, "/recipe", "null is not a string."),
        ({"optimizer": 5}, "/optimizer", """5 is not "sgd" or "adamw" or an object or null."""),
    ],
)
def test_each_mistake_is_located_and_corrected(change: dict[str, Any], at: str, says: str) -> None:
    (detail,) = schema_details(SCHEMA, {"recipe": "x"} | change)
    assert detail.pointer == at
    assert says in detail.message


def test_a_missing_field_is_pointed_at_by_its_own_name() -> None:
    assert [detail.pointer for detail in schema_details(SCHEMA, {})] == ["/recipe"]


def test_every_mistake_is_told_at_once_and_only_once() -> None:
    details = schema_details(SCHEMA, {"epochs": 0, "schedule": "no", "nested": {"momentum": 2, "more": 1}})
    assert [detail.pointer for detail in details] == [
        "/epochs", "/nested/momentum", "/nested/more", "/recipe", "/schedule",
    ]  # fmt: skip


def test_what_fits_has_no_details() -> None:
    assert schema_details(SCHEMA, {"recipe": "x", "batch_size": "auto", "optimizer": None}) == []


def test_pointers_are_escaped() -> None:
    assert pointer(["a/b", 0, "m~n"]) == "/a~1b/0/m~0n"
    assert pointer([]) == ""


def test_numbers_that_are_not_finite_are_found_wherever_they_hide() -> None:
    value = {"a": [1.0, {"b": float("nan")}], "c": float("-inf"), "d": "nan"}
    assert [detail.pointer for detail in not_finite(value)] == ["/a/1/b", "/c"]


def test_defaults_are_filled_in_through_references() -> None:
    whole = {"properties": {"root": SCHEMA}, "$defs": SCHEMA["$defs"]}
    filled = schema_defaults(whole, {"epochs": 3, "nested": {}}, "root")
    assert filled == {"epochs": 3, "schedule": "cosine", "nested": {"momentum": 0.9}}


def test_pydantic_errors_point_into_what_was_sent() -> None:
    class Inner(BaseModel):
        x: int

    class Outer(BaseModel):
        value: Inner | int
        y: int

    sent = {"value": {"x": "no"}}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(sent)
    pointers = [detail.pointer for detail in validation_details(caught.value, sent)]
    assert pointers == ["/value/x", "/value", "/y"]
