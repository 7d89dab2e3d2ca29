"""What this worker can run: the recipes it finds in `pretrain/`, `finetune/` and `apply/`, and every architecture.

`python -m worker.catalogue --json` prints what is published to the database.
"""

import copy
import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from pydantic import Field, create_model

from app.domain.errors import UserFault
from app.domain.spec import Spec, Training
from worker import apply, finetune, pretrain
from worker.parts import architectures
from worker.recipe import Recipe

Json = dict[str, Any]

# What a recipe that uses a model takes of `training`: how a forward pass computes, and what is drawn.
_OF_A_PASS = frozenset({"batch_size", "precision", "memory_format", "deterministic", "seed"})


@cache
def recipes() -> Mapping[str, Recipe]:
    """Import every recipe and give them by name.

    Raises:
        ValueError: two files declare the same name, or a file in a recipe folder declares none.
    """
    found: dict[str, Recipe] = {}
    places: dict[str, str] = {}
    for package in (pretrain, finetune, apply):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            recipe: Recipe | None = getattr(importlib.import_module(module.name), "RECIPE", None)
            if recipe is None:
                raise ValueError(f"{module.name} declares no RECIPE; what recipes share belongs in worker/parts")
            if recipe.name in found:
                raise ValueError(f"{module.name} and {places[recipe.name]} both declare the recipe {recipe.name!r}")
            if recipe.kind != package.__name__.rpartition(".")[2]:
                raise ValueError(f"{module.name} declares the kind {recipe.kind!r} and lies in another folder")
            found[recipe.name], places[recipe.name] = recipe, module.name
    return found


def recipe(name: str) -> Recipe:
    """Give a recipe by name.

    Raises:
        UserFault: there is none on this worker.
    """
    if name not in recipes():
        raise UserFault(
            f"This worker has no recipe {name!r}; it has {', '.join(sorted(recipes()))}.", code="unknown_recipe"
        )
    return recipes()[name]


def published() -> dict[str, list[Json]]:
    """Give the rows that are published: `{"recipes": […], "architectures": […]}`, keyed as the tables are."""
    return {"recipes": [row(found) for _, found in sorted(recipes().items())], "architectures": architectures.facts()}


def row(found: Recipe) -> Json:
    """Give the published row of one recipe."""
    return {
        "name": found.name,
        "kind": found.kind,
        "version": found.version,
        "summary": found.summary,
        "tasks": list(found.tasks),
        "schema": schema(found),
        "defaults": json.loads(json.dumps(found.defaults)),
        "template": template(found),
        "requires": requires(found),
    }


def requires(found: Recipe) -> Json:
    """Give what a recipe needs as it is published, and what one that uses a model does not read."""
    needs = found.requires
    if found.apply is not None:
        unread = (*(f"training.{name}" for name in Training.model_fields), "data.validation_fraction")
        passed = {*(f"training.{name}" for name in _OF_A_PASS), *needs.without}
        needs = replace(needs, unread=tuple(name for name in unread if name not in passed))
    return asdict(needs) | {"plans": found.plan is not None, "gives_model": found.gives_model}


def schema(found: Recipe) -> Json:
    """Give the JSON Schema of the whole job body for a recipe; its defaults are those that hold for this recipe."""
    body = create_model(
        f"{found.Params.__name__.removesuffix('Params')}Job", __base__=Spec,
        params=(found.Params, Field(default_factory=found.Params, description="What this recipe alone knows.")),
    )  # fmt: skip
    made = body.model_json_schema(mode="validation")
    made["properties"]["recipe"] = {"const": found.name, "type": "string", "title": "Recipe"}
    made["properties"]["params"]["default"] = found.Params().model_dump(mode="json")
    for name, value in found.defaults.items():
        _set_default(made, made["properties"][name], name, value)
    return made


def _set_default(whole: Json, place: Json, name: str, value: Any) -> None:
    """Lay a recipe's default over the one in the schema; a definition that only this field uses is changed in place."""
    reference = place.get("$ref") or next((each["$ref"] for each in place.get("allOf", []) if "$ref" in each), None)
    if reference is None or not isinstance(value, Mapping):
        place["default"] = copy.deepcopy(value)
        return
    definition = whole["$defs"][reference.rpartition("/")[2]]
    for key, item in value.items():
        _set_default(whole, definition["properties"][key], f"{name}.{key}", item)
    if isinstance(place.get("default"), dict):
        place["default"] = merge(place["default"], value)


def template(found: Recipe) -> Json:
    """Give a body that can be POSTed once its ids are filled in."""
    body: Json = {
        "recipe": found.name,
        "dataset": f"ds_{'0' * 26}",
        "model": f"mdl_{'0' * 26}" if found.requires.trained else {"architecture": "small_cnn"},
        "params": found.Params().model_dump(mode="json"),
    }
    if found.apply is None:
        body["training"] = {"epochs": Spec.model_fields["training"].default.epochs}
    return merge(body, found.defaults)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Json:
    """Lay one JSON object over another, key by key."""
    made = copy.deepcopy(dict(under))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = merge(made[key], value) if both else copy.deepcopy(value)
    return made


if __name__ == "__main__":
    json.dump(published(), sys.stdout, indent=None if "--json" in sys.argv else 2)
    print()
