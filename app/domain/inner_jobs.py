"""Jobs that the params of another job describe: a recipe by its name in one field, its params in another. Pure.

A recipe's published schema says where. A property with the keyword `part_of_job` holds a part of another job's body,
and what it holds is checked as if that job had been POSTed with the outer job's dataset, network and training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import Field, ValidationError

from app.domain.errors import Detail
from app.domain.fit import Network, check
from app.domain.pointers import followed, pointer, schema_details, validation_details
from app.domain.recipes import Published, unknown
from app.domain.spec import Spec, Strict

Json = dict[str, Any]
Path = tuple[str | int, ...]
Recipes = Mapping[str, Published]  # all that are known, by name

KEYWORD = "part_of_job"
_SPEC_SCHEMA = Spec.model_json_schema()


class Part(Strict):
    """What a schema says of a property that holds a part of another job's body.

    The recipe of that job is `recipe`, or stands in the property beside this one that `named_by` names.
    """

    part: Literal["params", "training"] = "params"
    recipe: str | None = None
    named_by: str | None = None
    called_by: str | None = None  # the property that names this job among its like, in place of its recipe
    kinds: tuple[str, ...] = ()  # of recipe that may be named; empty is any
    in_turns: bool = False  # its loss takes turns with another one, which some recipes refuse (`requires.alone`)
    own: dict[str, Json] = Field(default={})  # what may be named and is no recipe, with the schema of its params
    without: dict[str, str] = Field(default={})  # fields that cannot be given here, and why

    def keyword(self) -> Json:
        """Give what is added to the property's schema."""
        return {KEYWORD: self.model_dump(mode="json", exclude_defaults=True)}


@dataclass(frozen=True)
class Inner:
    """One job that is described, and where: `place` is the object that holds its parts, `parts` are its properties."""

    place: Path
    holder: Json
    parts: Mapping[str, Part]  # by property, all of one recipe

    @property
    def rule(self) -> Part:
        """What all its parts say of the recipe."""
        return next(iter(self.parts.values()))

    @property
    def name(self) -> str:
        """The recipe that is named."""
        return self.rule.recipe or str(self.holder.get(self.rule.named_by or ""))

    @property
    def named_at(self) -> str | None:
        """Where the recipe is named, if it is."""
        return pointer((*self.place, self.rule.named_by)) if self.rule.named_by else None

    @property
    def label(self) -> str:
        """What this job is called among its like."""
        return str(self.holder.get(self.rule.called_by or "") or self.name)

    def given(self, part: str) -> Json:
        """Give what the body says of `params` or `training`."""
        return {
            key: value
            for name, rule in self.parts.items() if rule.part == part
            for key, value in cast(Json, self.holder.get(name) or {}).items()
        }  # fmt: skip

    def outer(self, inside: str) -> str:
        """Turn a pointer into this job's body into one into the body that describes it."""
        part, *rest = inside.removeprefix("/").split("/")
        for name, rule in self.parts.items():
            if rule.part == part and (part == "params" or (rest and rest[0] in self.given(part))):
                return "/".join([pointer((*self.place, name)), *rest])
        return inside if part == "training" else self.named_at or inside


def find(schema: Mapping[str, Any], params: Json) -> list[Inner]:
    """Find the jobs that `params` describe; `schema` is that of the whole body."""
    described = schema.get("properties", {}).get("params", {})
    return list(_below(described, params, ("params",), schema))


def _below(described: Mapping[str, Any], value: Any, place: Path, root: Mapping[str, Any]) -> Iterator[Inner]:
    described = followed(described, root)
    for branch in described.get("anyOf", ()):
        yield from _below(branch, value, place, root)
    if isinstance(value, dict):
        holder, properties = cast(Json, value), cast(Mapping[str, Any], described.get("properties", {}))
        rules = {name: Part.model_validate(each[KEYWORD]) for name, each in properties.items() if KEYWORD in each}
        for source in dict.fromkeys((rule.recipe, rule.named_by) for rule in rules.values()):
            yield Inner(
                place, holder, {name: rule for name, rule in rules.items() if (rule.recipe, rule.named_by) == source}
            )
        for name, below in properties.items():
            if name in holder and name not in rules:
                yield from _below(below, holder[name], (*place, name), root)
    elif isinstance(value, list | tuple) and "items" in described:
        for number, item in enumerate(cast(Sequence[Any], value)):
            yield from _below(described["items"], item, (*place, number), root)


def check_inner(
    spec: Spec, recipe: Published, recipes: Recipes, network: Network | None, dataset: Mapping[str, Any] | None
) -> list[Detail]:
    """Find what is wrong with the jobs that the params of `spec` describe; the pointers are into its own body.

    `dataset` and `network` are what the job itself has, as for `check`.
    """
    details: list[Detail] = []
    called: dict[tuple[Path, str], Inner] = {}
    for inner in find(recipe.schema, spec.params):
        details += _of_one(inner, spec, recipes, network, dataset)
        if inner.rule.called_by and called.setdefault((inner.place[:-1], inner.label), inner) is not inner:
            where = pointer((*inner.place, inner.rule.called_by))
            details.append(
                Detail(
                    pointer=where, message=f"Another one is called {inner.label!r}, too: give this one another name."
                )
            )
    return list(dict.fromkeys(details))


def _of_one(
    inner: Inner, spec: Spec, recipes: Recipes, network: Network | None, dataset: Mapping[str, Any] | None
) -> Iterator[Detail]:
    rule, name, params = inner.rule, inner.name, inner.given("params")
    for field in rule.without.keys() & params.keys():
        yield Detail(pointer=inner.outer(f"/params/{field}"), message=f"Leave this out: {rule.without[field]}.")
    if name in rule.own:
        for one in schema_details(rule.own[name], params):
            yield Detail(pointer=inner.outer(f"/params{one.pointer}"), message=f"{one.message} (Of {name}.)")
        return
    recipe = recipes.get(name)
    if recipe is None or (rule.kinds and recipe.kind not in rule.kinds) or (rule.in_turns and _alone(recipe)):
        yield _refused_name(inner, recipe, recipes)
        return
    training = {**spec.training.model_dump(mode="json", exclude_defaults=True), **inner.given("training")}
    body = {**spec.model_dump(mode="json"), "recipe": name, "params": params, "training": training}
    found = schema_details(recipe.schema, body) + schema_details(_SPEC_SCHEMA, body)
    if not found:
        try:
            found = check(Spec.model_validate(body), recipe, network, dataset)
        except ValidationError as error:
            found = validation_details(error, body)
    for one in found:
        where, says = inner.outer(one.pointer), one.message
        yield Detail(pointer=where, message=says if name in says else f"{says} (Of {name}.)")


def _alone(recipe: Published) -> str | None:
    return recipe.requires.get("alone")


def _refused_name(inner: Inner, recipe: Published | None, recipes: Recipes) -> Detail:
    rule, name, at = inner.rule, inner.name, inner.named_at or pointer(inner.place)
    possible = [
        each.name for each in recipes.values()
        if (not rule.kinds or each.kind in rule.kinds) and not (rule.in_turns and _alone(each))
    ]  # fmt: skip
    names = sorted([*rule.own, *possible])
    if recipe is None:
        return unknown("recipe", name, names, at=at)
    if rule.kinds and recipe.kind not in rule.kinds:
        kinds = " or ".join(rule.kinds)
        return Detail(
            pointer=at,
            message=f"{name} is of kind {recipe.kind}, and one of kind {kinds} is wanted: {', '.join(names)}.",
        )
    return Detail(
        pointer=at,
        message=f"{name} cannot take turns with another loss, because {_alone(recipe)}; use {', '.join(names)}. Or run "
        f"{name} first, and start this job from its model.",
    )
