"""`/v1/recipes` and `/v1/architectures`: what can be run, as the workers published it."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import ConfigDict, Field

from app.deps import ReadDep, SessionDep
from app.domain.errors import NotFound
from app.domain.recipes import unknown
from app.http.envelope import Listing, Out
from app.store import recipes, tables

router = APIRouter(tags=["recipes"])


class Requirements(Out):
    """What a recipe needs of the data and of the network."""

    model_config = ConfigDict(frozen=True, extra="allow")

    labels: bool = False
    unlabelled: bool = False
    test_labels: bool = Field(default=False, description="A test split with labels.")
    min_samples: int = 1
    min_batch: int = 1
    min_classes: int = 0
    architectures: list[str] | None = Field(default=None, description="Families; null is any.")
    reason: str | None = None
    gives_model: bool = Field(default=False, description="An `apply` recipe whose job another one may start from.")
    plans: bool = Field(default=False, description="It runs other jobs, its children, and holds no slot meanwhile.")


class RecipeOut(Out):
    """One way to train or to use a model."""

    object: Literal["recipe"] = "recipe"
    name: str
    kind: Literal["pretrain", "finetune", "apply"]
    version: str
    summary: str
    tasks: list[str]
    body_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema of the whole body of a job.")
    defaults: dict[str, Any] = Field(description="Laid under the body.")
    template: dict[str, Any] = Field(description="A body that can be sent once its ids are filled in.")
    requires: Requirements


class ArchitectureOut(Out):
    """A network that can be started from."""

    model_config = ConfigDict(frozen=True, extra="allow")

    object: Literal["architecture"] = "architecture"
    name: str
    family: str
    stages: int | list[str]
    patch: int | None = None
    min_image_size: int
    channels: int | list[int]
    parameters: int
    options_schema: dict[str, Any] = Field(
        default={}, alias="schema", description="JSON Schema of the job's `model` object."
    )


@router.get("/v1/recipes")
def read_all(session: SessionDep, _principal: ReadDep) -> Listing[RecipeOut]:
    """List every recipe."""
    recipes.require_published(session)
    return Listing(data=[_out(row) for row in recipes.every(session)], has_more=False)


@router.get("/v1/recipes/{name}")
def read_one(
    name: Annotated[str, Path(description="A recipe's name")], session: SessionDep, _principal: ReadDep
) -> RecipeOut:
    """Give one recipe with the schema of its job body, its defaults and a template."""
    recipes.require_published(session)
    found = recipes.find(session, name)
    if found is None:
        raise NotFound(unknown("recipe", name, recipes.names(session), at="").message)
    return _out(found)


@router.get("/v1/architectures")
def read_architectures(session: SessionDep, _principal: ReadDep) -> Listing[ArchitectureOut]:
    """List every network that can be started from."""
    recipes.require_published(session)
    rows = recipes.every_architecture(session)
    return Listing(
        data=[ArchitectureOut.model_validate({**row.facts, "name": row.name}) for row in rows], has_more=False
    )


def _out(row: tables.Recipe) -> RecipeOut:
    fields = ("name", "kind", "version", "summary", "tasks", "schema", "defaults", "template", "requires")
    return RecipeOut.model_validate({field: getattr(row, field) for field in fields})
