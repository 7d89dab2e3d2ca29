"""From the body of a request to a job that can be inserted: every row it names is read, locked and checked."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.domain.errors import Conflict, Detail, Invalid, NotFound
from app.domain.fit import Network, check, warnings
from app.domain.inner_jobs import check_inner
from app.domain.jobs import MEASURE, Kind, Status
from app.domain.recipes import Published, refuse, resolve, unknown
from app.domain.spec import Architecture, Spec
from app.store import life, models, recipes, tables
from app.store.ids import new_id

Json = dict[str, Any]

_MAKES_A_MODEL = (Kind.PRETRAIN, Kind.FINETUNE)


@dataclass(frozen=True)
class Submission:
    """A spec that was found possible, and the rows it starts from."""

    spec: Spec
    recipe: Published
    dataset: tables.Dataset | None = None
    base_model: tables.Model | None = None
    wait_for: tables.Job | None = None
    warnings: tuple[str, ...] = ()

    def job(self, project_id: str, *, max_attempts: int) -> tables.Job:
        """Make the row of this job, ready to be inserted."""
        return tables.Job(
            id=new_id("job"), project_id=project_id, name=self.spec.name, recipe=self.recipe.name,
            recipe_version=self.recipe.version, kind=self.recipe.kind, internal=False,
            status=Status.WAITING if self.wait_for else Status.QUEUED,
            dataset_id=self.dataset.id if self.dataset else None,
            base_model_id=self.base_model.id if self.base_model else None,
            wait_for_job_id=self.wait_for.id if self.wait_for else None,
            priority=self.spec.priority, device=self.spec.resources.device, gpus=self.spec.resources.gpus,
            spec=self.spec.model_dump(mode="json"), meta=dict(self.spec.metadata), max_attempts=max_attempts,
        )  # fmt: skip

    def measuring_job(self, project_id: str, *, max_attempts: int) -> tables.Job:
        """Make the row of the internal job that runs this spec for a few steps; its spec is the one it measures.

        Raises:
            Invalid: there are no steps to run.
        """
        if self.recipe.kind == Kind.APPLY:
            raise Invalid(
                f"{self.recipe.name} has no training steps to measure; dry_run=true checks the body without running.",
                param="dry_run",
            )
        job = self.job(project_id, max_attempts=max_attempts)
        job.name = f"Measure {self.spec.name}"[:200]
        job.recipe, job.kind, job.internal = MEASURE, Kind.INTERNAL, True
        return job


def prepare(session: Session, project_id: str, body: Json) -> Submission:
    """Check a body against everything that it names; what was checked stays locked until the commit.

    Raises:
        Invalid, NotFound: a value to correct; the pointer says which.
        Conflict: something it starts from is not ready, or never will be; the error carries its status.
        Unavailable: no worker ever published a recipe.
    """
    published = recipes.Recipes(session)
    recipe = _recipe(session, body, published)
    architectures = recipes.Architectures(session)
    spec = resolve(body, recipe, architectures)
    dataset = _dataset(session, project_id, spec.dataset) if spec.dataset else None
    spec = _start_from_weights(session, project_id, spec, body)

    base_model, wait_for = None, None
    if isinstance(spec.model, str) and spec.model.startswith("mdl_"):
        base_model = _base_model(session, project_id, spec.model, at="model")
    elif isinstance(spec.model, str):
        base_model, wait_for = _parent(session, project_id, spec.model)
    network = _network(session, spec, base_model, wait_for, architectures)
    facts = dataset.facts if dataset else None
    if details := [
        *check(spec, recipe, network, facts),
        *check_inner(spec, recipe, published, network, facts),
    ]:
        raise refuse(details)
    if spec.name is None:
        name = f"{recipe.name}-{dataset.name}" if dataset else recipe.name
        spec = spec.model_copy(update={"name": name[:200]})
    return Submission(spec, recipe, dataset, base_model, wait_for, tuple(warnings(spec, recipe, facts)))


def _recipe(session: Session, body: Json, published: recipes.Recipes) -> Published:
    name = body.get("recipe")
    if not isinstance(name, str):
        message = "Name the recipe to run; GET /v1/recipes lists them." if name is None else "Give a recipe's name."
        raise refuse([Detail(pointer="/recipe", message=message)])
    if name not in published:
        recipes.require_published(session)
        raise refuse([unknown("recipe", name, list(published), at="/recipe")])
    return published[name]


def _dataset(session: Session, project_id: str, dataset_id: str) -> tables.Dataset:
    # The lock keeps a delete away until this job is committed and counts as a user of the dataset.
    found = session.get(tables.Dataset, dataset_id, with_for_update={"read": True})
    if found is None or found.project_id != project_id or found.deleted_at is not None:
        raise NotFound(f"There is no dataset {dataset_id} in this project.", param="dataset")
    if found.status == "failed":
        raise Conflict(
            f"The dataset {dataset_id} failed to be read, so no job can use it; see its `error`.",
            code="dataset_failed", param="dataset", status=found.status,
        )  # fmt: skip
    if found.status != "ready":
        raise Conflict(
            f"The dataset {dataset_id} is {found.status}; wait for it with GET /v1/datasets/{dataset_id}?wait=30.",
            code="dataset_not_ready", param="dataset", status=found.status,
        )  # fmt: skip
    return found


def _base_model(session: Session, project_id: str, model_id: str, *, at: str) -> tables.Model:
    found = models.visible(session, project_id, model_id, keep=True)
    if found is None:
        raise NotFound(f"There is no model {model_id} in this project, and no public one.", param=at)
    if found.status != "ready":
        raise Conflict(
            f"The model {model_id} is {found.status}; only a ready one can be started from.",
            code="model_not_ready", param=at, status=found.status,
        )  # fmt: skip
    return found


def _start_from_weights(session: Session, project_id: str, spec: Spec, body: Json) -> Spec:
    """`weights: "mdl_…"` says the same as `model: "mdl_…"`, as long as the network is that model's own."""
    if not isinstance(spec.model, Architecture) or not str(spec.model.weights).startswith("mdl_"):
        return spec
    model_id = str(spec.model.weights)
    config = _base_model(session, project_id, model_id, at="model.weights").config or {}
    built: Json = {**config.get("architecture", {}), "image_size": config.get("image_size"), "weights": model_id}
    given: Json = body["model"] if isinstance(body.get("model"), dict) else {}
    details = [
        Detail(
            pointer=f"/model/{key}", message=f"The model {model_id} was built with {built.get(key)!r}; leave this out."
        )
        for key, value in given.items()
        if value is not None and value != built.get(key)
    ]
    if details:
        raise refuse(details)
    return spec.model_copy(update={"model": model_id})


def _parent(session: Session, project_id: str, job_id: str) -> tuple[tables.Model | None, tables.Job | None]:
    """Read the job whose model is asked for under its lock: it cannot end between this look and our commit."""
    parent = life.lock(session, job_id)
    if parent is None or parent.project_id != project_id or parent.deleted_at is not None:
        raise NotFound(f"There is no job {job_id} in this project.", param="model")
    if parent.kind not in _MAKES_A_MODEL and not _gives_model(session, parent):
        raise Invalid(
            f"{job_id} is a job of kind {parent.kind} and makes no model; name a pretrain or finetune job.",
            param="model", details=[Detail(pointer="/model", message="This job makes no model.")],
        )  # fmt: skip
    if parent.status in (Status.FAILED, Status.CANCELLED) or (
        parent.status in (Status.SUCCEEDED, Status.STOPPED) and parent.model_id is None
    ):
        raise Conflict(
            f"The job {job_id} ended {parent.status} and made no model; start from another one, or retry it first.",
            code="parent_failed", param="model", status=parent.status,
        )  # fmt: skip
    if parent.model_id is not None:
        return _base_model(session, project_id, parent.model_id, at="model"), None
    return None, parent


def _gives_model(session: Session, job: tables.Job) -> bool:
    """Say whether a job that trains nothing itself will name the model of one of its children."""
    recipe = recipes.find(session, job.recipe)
    return recipe is not None and bool(recipe.requires.get("gives_model"))


def _network(
    session: Session,
    spec: Spec,
    base_model: tables.Model | None,
    wait_for: tables.Job | None,
    architectures: recipes.Architectures,
) -> Network | None:
    """Find out what network the job will start from, through a chain of jobs that have not run yet if need be."""
    by_reference = not isinstance(spec.model, Architecture)
    options: Json | None = spec.model.model_dump(mode="json") if isinstance(spec.model, Architecture) else None
    while options is None:
        if base_model is not None and base_model.config is not None:
            options = {**base_model.config["architecture"], "image_size": base_model.config["image_size"]}
        elif wait_for is not None:
            model: Any = wait_for.spec.get("model")
            options = model if isinstance(model, dict) else None
            base_model = session.get(tables.Model, wait_for.base_model_id) if wait_for.base_model_id else None
            wait_for = session.get(tables.Job, wait_for.wait_for_job_id) if wait_for.wait_for_job_id else None
        else:
            return None
    facts = architectures.get(options.get("architecture", ""))
    return Network(options, facts, by_reference) if facts is not None else None
