"""From the body of a job to its spec: defaults filled in, schemas checked, what cannot be alone refused. Pure.

The API knows recipes and architectures only as the rows that workers published; both arrive here as plain data, so a
job is refused with a reason before it is queued, without torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from app.domain.chosen import not_given
from app.domain.errors import Detail, Invalid
from app.domain.pointers import not_finite, schema_defaults, schema_details, validation_details
from app.domain.presets import laid_under, refused_preset
from app.domain.spec import Architecture, Optimizer, Spec

Json = dict[str, Any]
Architectures = Mapping[str, Mapping[str, Any]]  # facts by name

_SPEC_SCHEMA = Spec.model_json_schema()
_SHARED_OPTIONS = frozenset(Architecture.model_fields)
TRAINS = ("pretrain", "finetune")  # the kinds of recipe that do


@dataclass(frozen=True)
class Published:
    """A recipe as a worker published it."""

    name: str
    kind: str
    version: str
    tasks: Sequence[str]
    schema: Json  # of the whole job body
    defaults: Json
    requires: Json


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Give the known names that look most like `name`, best first."""
    return get_close_matches(name, sorted(known), n=count, cutoff=0.5)


def unknown(what: str, name: str, known: Sequence[str], *, at: str) -> Detail:
    """Say that `name` is no known recipe, architecture …, and which ones come nearest."""
    close = nearest(name, known)
    known_names = ", ".join(sorted(known)[:12]) + (", …" if len(known) > 12 else "")
    correction = f"did you mean {' or '.join(close)}?" if close else f"known: {known_names or 'none'}."
    return Detail(pointer=at, message=f"Unknown {what} {name!r}; {correction}")


def refuse(details: Sequence[Detail]) -> Invalid:
    """Make the one error that carries these details."""
    first = details[0]
    param = first.pointer.removeprefix("/").replace("/", ".") or None
    more = f" ({len(details) - 1} more in `details`)" if len(details) > 1 else ""
    return Invalid(f"{param or 'body'}: {first.message}{more}", param=param, details=details)


def resolve(body: Json, recipe: Published, architectures: Architectures) -> Spec:
    """Lay the recipe's defaults and those of a preset under the body and check it against the published schemas.

    Raises:
        Invalid: with one detail for each value to correct.
    """
    if details := not_finite(body):
        raise refuse(details)
    merged = laid_under(body, recipe.name, recipe.defaults)
    found = schema_details(recipe.schema, merged) + schema_details(_SPEC_SCHEMA, merged)
    if (detail := refused_preset(body, recipe.name)) is not None:
        found.append(detail)
    if found:
        raise refuse(
            sorted({detail.pointer: detail for detail in reversed(found)}.values(), key=lambda detail: detail.pointer)
        )
    try:
        spec = Spec.model_validate(merged)
    except ValidationError as error:
        raise refuse(validation_details(error, merged)) from error

    changes: Json = {"params": schema_defaults(recipe.schema, spec.params, "params")}
    if isinstance(spec.training.optimizer, str):
        changes["training"] = spec.training.model_copy(update={"optimizer": Optimizer(name=spec.training.optimizer)})
    if isinstance(spec.model, Architecture):
        changes["model"] = architecture(spec.model, architectures, at="/model")
    spec = spec.model_copy(update=changes)
    if details := list(_missing(spec, recipe)):
        raise refuse(details)
    return spec


def architecture(model: Architecture, architectures: Architectures, *, at: str) -> Architecture:
    """Check an architecture's name and its own options by its published schema, and fill in their defaults.

    `at` is where the request describes it.

    Raises:
        Invalid: with one detail for each value to correct.
    """
    facts = architectures.get(model.architecture)
    if facts is None:
        raise refuse([unknown("architecture", model.architecture, list(architectures), at=f"{at}/architecture")])
    schema: Json = facts.get("schema") or {"type": "object", "additionalProperties": False}
    described: Mapping[str, Any] = schema.get("properties", {})
    whole = model.model_dump(mode="json")
    own = {key: value for key, value in whole.items() if key not in _SHARED_OPTIONS or key in described}
    if str(model.weights).startswith("mdl_"):
        own.pop("weights", None)  # a model of ours, which no schema can know
    found = schema_details(schema, own, also_known=_SHARED_OPTIONS)
    if found:
        raise refuse([Detail(pointer=f"{at}{one.pointer}", message=one.message) for one in found])
    filled = schema_defaults({"properties": {"own": schema}, "$defs": schema.get("$defs", {})}, own, "own")
    return Architecture.model_validate(filled | whole)


def _missing(spec: Spec, recipe: Published) -> Iterable[Detail]:
    if recipe.kind in TRAINS and spec.dataset is None:
        yield Detail(pointer="/dataset", message=f"{recipe.name} needs a dataset: give its id, `ds_…`.")
    if recipe.kind in TRAINS and spec.model is None:
        yield Detail(
            pointer="/model",
            message='Give a network to start from: {"architecture": "…"}, a model `mdl_…`, or a job `job_…`.',
        )
    if recipe.requires.get("trained"):
        yield from _untrained(spec, recipe)
    yield from not_given(recipe.requires, spec, recipe.name)
    if spec.training.precision == "float16" and spec.resources.device == "cpu":
        yield Detail(
            pointer="/training/precision",
            message="float16 has no usable arithmetic on a CPU: use auto or float32.",
        )
    if spec.data.labels_per_class is not None and spec.data.label_fraction != 1:
        yield Detail(
            pointer="/data/labels_per_class",
            message="Give labels_per_class or label_fraction, not both: each is the budget.",
        )


def _untrained(spec: Spec, recipe: Published) -> Iterable[Detail]:
    if spec.dataset is None:
        yield Detail(pointer="/dataset", message=f"{recipe.name} looks at a dataset: give its id, `ds_…`.")
    if spec.model is None or (isinstance(spec.model, Architecture) and spec.model.weights is None):
        yield Detail(
            pointer="/model",
            message=f"{recipe.name} uses a trained model: give `mdl_…`, a job `job_…` that makes one, or an "
            "architecture with `weights`.",
        )
