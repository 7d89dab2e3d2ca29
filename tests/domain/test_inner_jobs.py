"""Jobs within the params of another: each value to correct is named where the outer body holds it."""

from typing import Any

import pytest

from app.domain.fit import Network
from app.domain.inner_jobs import Part, check_inner, find
from app.domain.recipes import Published, resolve
from tests.domain.bodies import ARCHITECTURES, body, facts

pytestmark = pytest.mark.unit

OWN = {"type": "object", "additionalProperties": False, "properties": {"threshold": {"type": "number", "maximum": 1}}}
ANY: dict[str, Any] = {"type": "object", "default": {}}


def published(name: str, kind: str, params: dict[str, Any], **requires: Any) -> Published:
    schema = {
        "properties": {"params": {"$ref": "#/$defs/Params"}},
        "$defs": {"Params": {"type": "object", "additionalProperties": False, "properties": params}},
    }
    return Published(name, kind, "1", ["image_classification"], schema, {}, requires)


def number(**limits: Any) -> dict[str, Any]:
    return {"type": "number"} | limits


METHOD = {
    "type": "object",
    "additionalProperties": False,
    "required": ["recipe"],
    "properties": {
        "recipe": {"type": "string"},
        "name": {"type": "string"},
        "params": ANY | Part(named_by="recipe", called_by="name", kinds=("pretrain",)).keyword(),
        "training": ANY | Part(part="training", named_by="recipe", called_by="name", kinds=("pretrain",)).keyword(),
    },
}
OUTER = {
    "turns": published(
        "turns",
        "finetune",
        {
            "objective": {"type": "string", "default": "own"},
            "objective_params": ANY
            | Part(
                named_by="objective",
                kinds=("pretrain",),
                in_turns=True,
                own={"own": OWN},
                without={"frozen": "it is shared"},
            ).keyword(),
        },
    ),
    "race": published("race", "apply", {"methods": {"anyOf": [{"type": "array", "items": METHOD}, {"type": "null"}]}}),
    "cells": published("cells", "apply", {"finetune": ANY | Part(recipe="tuned").keyword()}),
}
RECIPES = OUTER | {
    "pairs": published(
        "pairs", "pretrain", {"temperature": number(exclusiveMinimum=0), "frozen": number()}, min_batch=4
    ),
    "patches": published("patches", "pretrain", {}, architectures=["vit"], reason="patches needs patches"),
    "groups": published(
        "groups", "pretrain", {"clusters": number()}, alone="it sees all", fewer_than_samples=["clusters"]
    ),
    "tuned": published("tuned", "finetune", {"trainable": {"type": "string"}}),
}
NETWORK = Network({"architecture": "small_cnn"}, ARCHITECTURES["small_cnn"])


def found(recipe: str, params: dict[str, Any], network: Network | None = NETWORK, **outer: Any) -> dict[str, str]:
    spec = resolve(
        body(recipe=recipe, params=params, model={"architecture": "small_cnn"}, **outer), RECIPES[recipe], ARCHITECTURES
    )
    details = check_inner(spec, RECIPES[recipe], RECIPES, network, facts())
    return {detail.pointer: detail.message for detail in details}


@pytest.mark.parametrize(
    ("params", "at", "says"),
    [
        ({"objective": "pair"}, "/params/objective", "did you mean pairs?"),
        (
            {"objective": "tuned"},
            "/params/objective",
            "tuned is of kind finetune, and one of kind pretrain is wanted: own, pairs",
        ),
        ({"objective": "groups"}, "/params/objective", "because it sees all; use own, pairs, patches. Or run groups"),
        ({"objective": "patches"}, "/params/objective", "small_cnn is a convolutional network: patches needs patches."),
        (
            {"objective_params": {"treshold": 0.5}},
            "/params/objective_params/treshold",
            "did you mean threshold? (Of own.)",
        ),
        ({"objective_params": {"threshold": 2}}, "/params/objective_params/threshold", "maximum of 1"),
        (
            {"objective": "pairs", "objective_params": {"temperature": 0}},
            "/params/objective_params/temperature",
            "or equal to the minimum of 0. (Of pairs.)",
        ),
        (
            {"objective": "pairs", "objective_params": {"threshold": 1}},
            "/params/objective_params/threshold",
            "Unknown field",
        ),
        ({"objective": "pairs", "objective_params": {"frozen": 1}}, "/params/objective_params/frozen", "it is shared."),
    ],
)
def test_the_params_of_a_named_recipe_are_its_own(params: dict[str, Any], at: str, says: str) -> None:
    details = found("turns", params)
    assert list(details) == [at], details
    assert says in details[at]


@pytest.mark.parametrize(
    "params",
    [{}, {"objective_params": {"threshold": 0.5}}, {"objective": "pairs", "objective_params": {"temperature": 1}}],
)
def test_what_holds_is_let_through(params: dict[str, Any]) -> None:
    assert found("turns", params) == {}


def test_the_outer_training_is_that_of_the_inner_job() -> None:
    assert found("turns", {"objective": "pairs"}, training={"batch_size": 2}) == {
        "/training/batch_size": "pairs needs at least 4 samples per batch, not 2."
    }
    assert found("cells", {"finetune": {"trainable": "last:4"}}) == {
        "/params/finetune/trainable": "small_cnn has 3 stages here: use last:1 to last:3, or all. (Of tuned.)"
    }
    assert found("cells", {"finetune": {"trainable": "last:4"}}, network=None) == {}


@pytest.mark.parametrize(
    ("method", "at", "says"),
    [
        ({"recipe": "pair"}, "recipe", "did you mean pairs?"),
        ({"recipe": "cells"}, "recipe", "cells is of kind apply"),
        ({"recipe": "patches"}, "recipe", "patches needs patches"),
        ({"recipe": "pairs", "params": {"temperatur": 1}}, "params/temperatur", "did you mean temperature?"),
        ({"recipe": "pairs", "training": {"epoch": 1}}, "training/epoch", "did you mean epochs"),
        ({"recipe": "pairs", "training": {"batch_size": 0}}, "training/batch_size", "minimum of 1"),
        ({"recipe": "pairs", "training": {"batch_size": 2}}, "training/batch_size", "at least 4"),
        ({"recipe": "groups", "name": "g", "params": {"clusters": 100}}, "params/clusters", "100 samples to look"),
        ({"recipe": "groups"}, "name", "Another one is called 'groups'"),
    ],
)
def test_each_of_several_is_checked_where_it_stands(method: dict[str, Any], at: str, says: str) -> None:
    details = found("race", {"methods": [{"recipe": "groups"}, method]})
    assert list(details) == [f"/params/methods/1/{at}"], details
    assert says in details[f"/params/methods/1/{at}"]


def test_two_of_one_recipe_need_two_names() -> None:
    assert found("race", {"methods": [{"recipe": "groups"}, {"recipe": "groups", "name": "again"}]}) == {}
    assert found("race", {"methods": None}) == {}


def test_a_recipe_without_inner_jobs_has_none() -> None:
    assert find(RECIPES["pairs"].schema, {"temperature": 1}) == []
