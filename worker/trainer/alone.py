"""Orders carried out with no server: the children of an orchestrating job run here, one after another.

The store's part (checking what is planned, keeping what became of it, handing a child the model that it starts from)
is done on local disk, with the same checks. What the children make is kept below `children/<key>/`.
"""

import gc
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from app.domain import fit
from app.domain import recipes as rules
from app.domain.datasets import DatasetFacts
from app.domain.errors import Invalid, JobFault, UserFault
from app.domain.inner_jobs import check_inner
from app.domain.models import ModelConfig
from app.domain.recipes import Published
from app.domain.spec import Architecture, Spec
from worker import catalogue
from worker.parts import architectures
from worker.report import BaseModelInput, Event, Failed, Finished, Message, Order, Progress, Reporter
from worker.trainer import orchestration

CHILDREN = "children"
DATASET, MODEL = f"ds_{'0' * 26}", f"mdl_{'0' * 26}"  # what a run without a server starts from has no id of its own
CarryOut = Callable[[Order, Reporter], int]


def carry_out(order: Order, reporter: Reporter, one: CarryOut) -> int:
    """Do what an order says and report exactly one Finished or Failed; `one` carries out a job that plans no others."""
    if catalogue.recipes()[order.recipe].plan is None:
        return one(order, reporter)
    ended: list[dict[str, Any]] = []
    if order.model is not None:
        order = order.model_copy(update={"model": order.model.model_copy(update={"id": MODEL})})
    models = {order.model.id: order.model} if order.model is not None else {}
    try:
        while (last := orchestration.run(_round(order, ended), reporter)).outcome == "children":
            total = len(ended) + len(last.children)
            for body in last.children:
                ended.append(_run_child(order, body, models, reporter, one, total=total, before=len(ended)))
                if reporter.wanted == "cancel":
                    reporter.send(Finished(outcome="cancelled"))
                    return 0
    except JobFault as fault:
        reporter.send(Failed(error=fault.failure("plan")))
        return 1
    reporter.send(last)
    return 0


def _round(order: Order, ended: list[dict[str, Any]]) -> Order:
    return order.model_copy(update={"children": tuple(ended)})


def _run_child(
    order: Order, body: dict[str, Any], models: dict[str, BaseModelInput], reporter: Reporter, one: CarryOut, *,
    total: int, before: int,
) -> dict[str, Any]:  # fmt: skip
    """Check, run and remember one child of `total`, of which `before` have ended."""
    key = str(body["child_key"])
    given = {name: value for name, value in body.items() if name != "child_key"} | {"name": key}
    spec = check(given, order.dataset, child=key)
    if isinstance(spec.model, str) and spec.model not in models:
        raise UserFault(f"Child {key!r}: there is no model {spec.model} here.", phase="plan")
    found = catalogue.recipe(spec.recipe)
    number = hashlib.sha256(f"{order.job} {key}".encode()).hexdigest()[:26]
    scratch, kept = Path(order.scratch) / "running", Path(order.scratch) / CHILDREN / key
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    heard: list[Finished | Failed] = []

    def listen(message: Message) -> None:
        if isinstance(message, Finished | Failed):
            heard.append(message)
        elif isinstance(message, Progress):
            fraction = (before + message.fraction) / total
            reporter.send(message.model_copy(update={"phase": f"{key}: {message.phase}", "fraction": fraction}))
        elif isinstance(message, Event):
            reporter.send(message.model_copy(update={"message": f"{key}: {message.message}"}))
        listening.want(reporter.wanted)

    listening = Reporter(listener=listen)
    one(
        order.model_copy(
            update={
                "job": f"job_{number}", "kind": found.kind, "recipe": found.name, "spec": spec.model_dump(mode="json"),
                "model": models[spec.model] if isinstance(spec.model, str) else None, "scratch": str(scratch),
                "plan": None, "checkpoint": None, "children": (),
            }
        ), listening,
    )  # fmt: skip
    gc.collect()  # what the child had mapped is in use on the shelf as long as it is there
    (last,) = heard
    child: dict[str, Any] = {
        "key": key, "job": f"job_{number}", "status": "failed", "spec": spec.model_dump(mode="json"), "best": None,
        "result": None, "metrics": {}, "model": None, "error": None,
    }  # fmt: skip
    if isinstance(last, Failed):
        return child | {"error": last.error.to_json()}
    kept.mkdir(parents=True, exist_ok=True)
    for file in (*last.files, *(last.model.files if last.model else ())):
        shutil.copyfile(scratch / file.file, kept / file.name)
    if last.model is not None:
        child["model"] = f"mdl_{number}"
        models[child["model"]] = BaseModelInput(
            id=child["model"], config=last.model.config, weights=str(kept / "model.safetensors")
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return child | {
        "status": last.outcome, "result": last.result, "metrics": dict(last.metrics), "best": last.best,
    }  # fmt: skip


def check(
    body: dict[str, Any], dataset: DatasetFacts | None, model: ModelConfig | None = None, *, child: str | None = None
) -> Spec:
    """Check the body of a job with the rules of `POST /v1/jobs`, by what this worker would publish.

    `model` is what `--model` gives to start from; null, like a null dataset, leaves its checks out.

    Raises:
        UserFault: the API would refuse it; the message names the field, and the child whose body it is.
    """
    known = _Known()
    recipe = known[catalogue.recipe(str(body.get("recipe"))).name]
    facts = {each["name"]: each["facts"] for each in architectures.facts()}
    start = {"model": MODEL} if model is not None else {}
    try:
        spec = rules.resolve({**body, **start, "dataset": DATASET}, recipe, facts)
        network = None
        if isinstance(spec.model, Architecture):
            network = fit.Network(spec.model.model_dump(mode="json"), facts[spec.model.architecture])
        elif model is not None:
            options = {**model.architecture, "image_size": model.image_size}
            network = fit.Network(options, facts[options["architecture"]], by_reference=True)
        rows = cast("dict[str, Any] | None", dataset.model_dump(mode="json") if dataset is not None else None)
        details = [*fit.check(spec, recipe, network, rows), *check_inner(spec, recipe, known, network, rows)]
        if details:
            raise rules.refuse(details)
    except Invalid as refused:
        whose = f"Child {child!r}: " if child else ""
        raise UserFault(f"{whose}{refused.message}", code="invalid_spec", phase="plan") from refused
    return spec


def doubts(spec: Spec, dataset: DatasetFacts) -> list[str]:
    """Name what will work, but hardly as meant, as the log of a job with a server begins."""
    return fit.warnings(spec, _Known()[spec.recipe], dataset.model_dump(mode="json"))


class _Known(Mapping[str, Published]):
    """The recipes of this worker as it publishes them, each made when it is asked for."""

    def __getitem__(self, name: str) -> Published:
        row = catalogue.row(catalogue.recipes()[name])
        return Published(**{key: row[key] for key in Published.__dataclass_fields__})

    def __iter__(self) -> Iterator[str]:
        return iter(catalogue.recipes())

    def __len__(self) -> int:
        return len(catalogue.recipes())
