"""A job that is made of other jobs: plans a round of children, or gathers what they came to. No pixel is read here.

The store inserts what is planned and wakes the job when its round is over; it holds no slot meanwhile. Killed at any
line and run again, the job plans the same children, and none is made twice.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.domain.errors import UserFault
from app.domain.spec import Architecture, Spec
from worker import catalogue
from worker.parts import architectures
from worker.recipe import Child, Facts
from worker.report import Finished, MadeFile, Metrics, Order, Progress, Reporter
from worker.trainer.assembly import read_spec

MAX_CHILDREN = 1000
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def run(order: Order, reporter: Reporter) -> Finished:
    """Plan the next round, or gather when there is none.

    Raises:
        UserFault: the spec cannot be planned, or too little of a round ended well to go on with.
    """
    spec, recipe, params = read_spec(order.spec)
    assert recipe.plan is not None
    assert recipe.gather is not None
    facts = facts_of(order, spec)
    children = [Child(**each) for each in order.children]
    if children:
        _tell_of(children, reporter)
    if order.stopping and not any(child.ended_well for child in children):
        return Finished(outcome="cancelled")
    known = {child.key for child in children}
    wanted = recipe.plan(params, facts, children)
    new = [_complete(body, spec) for body in wanted if _key(body) not in known]
    total = len(children) + len(new)
    if total > MAX_CHILDREN:
        raise UserFault(f"This would be {total} jobs; {MAX_CHILDREN} are the limit: ask for fewer.", code="too_many")
    reporter.send(Progress(phase="children", fraction=len(children) / max(total, 1)))
    if new and not order.stopping:
        named = ", ".join(body["child_key"] for body in new[:12]) + (", …" if len(new) > 12 else "")
        reporter.event("children.planned", f"{len(new)} jobs are next: {named}.", count=len(new))
        return Finished(outcome="children", children=tuple(new))
    gathered = recipe.gather(params, facts, children)
    files: list[MadeFile] = []
    for name, (media_type, content) in gathered.files.items():
        (Path(order.scratch) / name).write_bytes(content)
        files.append(MadeFile(name=name, file=name, media_type=media_type))
    if gathered.metrics:
        reporter.send(Metrics(rows=tuple((name, 0, value) for name, value in gathered.metrics.items())))
    return Finished(
        outcome="stopped" if order.stopping else "succeeded", result=gathered.result, metrics=dict(gathered.metrics),
        files=tuple(files), adopts=gathered.model,
    )  # fmt: skip


def facts_of(order: Order, spec: Spec) -> Facts:
    """Give what `plan` and `gather` may know of an order."""
    config = order.model.config if order.model is not None else None
    name = config.architecture.get("architecture") if config is not None else None
    if isinstance(spec.model, Architecture):
        name = spec.model.architecture
    return Facts(
        spec=spec, dataset=order.dataset, model=order.model.id if order.model is not None else None, config=config,
        family=next((row["facts"]["family"] for row in architectures.facts() if row["name"] == name), None),
        recipes=catalogue.recipes(), stopping=order.stopping,
    )  # fmt: skip


def _key(body: dict[str, Any]) -> str:
    key = body.get("child_key")
    assert isinstance(key, str), f"a recipe planned a child with the key {key!r}"
    assert _KEY.fullmatch(key), f"a recipe planned a child with the key {key!r}"
    return key


def _complete(body: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """Give a child what it takes over from its parent."""
    return {"dataset": spec.dataset, "resources": spec.resources.model_dump(mode="json"), **body}


def _tell_of(children: Sequence[Child], reporter: Reporter) -> None:
    lost = [child for child in children if not child.ended_well]
    message = f"{len(children) - len(lost)} of {len(children)} jobs ended well"
    message += "".join(f"; {child.key} {child.status}: {child.why}" for child in lost[:8]) or "."
    reporter.event(
        "children.ended", message, level="warning" if lost else "info", failed=[child.key for child in lost]
    )  # fmt: skip
