"""A job that trains, from its order to the files of its model; also as one of several processes."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from app.domain.errors import JobFault
from worker import evaluate, loop
from worker.checkpoint import Checkpoints, Contents
from worker.loop import Result
from worker.parts import compute, distributed
from worker.parts.export import Card, export
from worker.parts.memory import is_out_of_memory, let_go, not_training
from worker.parts.taken_over import latest
from worker.parts.tuning import Plan
from worker.report import Finished, MadeModel, Metrics, Order, Reporter
from worker.ticker import Ticker
from worker.trainer import ranks, show
from worker.trainer.announce import announce
from worker.trainer.assembly import Assembly, assemble, start
from worker.trainer.trouble import does_not_fit, translated, with_less_memory


def train(order: Order, reporter: Reporter) -> Finished:
    """Train as ordered; after running out of memory in a way that takes less, from the last checkpoint.

    On a CPU nothing is raised where memory runs out: the kernel ends the process. That attempt is made up for here.
    """
    newest = Path(order.checkpoint) if order.checkpoint else None
    checkpoints = Checkpoints(Path(order.scratch), reporter, newest=newest)
    first, plan = plans_of(order, checkpoints)
    spare = order.spare_memory
    while True:
        made = assemble(order, reporter, plan=plan)
        plan = made.plan
        announce(plan, made.device, reporter, first=first)
        made = start(
            made, order, reporter, epochs_done=_epochs_done(plan, checkpoints), at_beginning=checkpoints.newest is None
        )  # fmt: skip
        if made.plan != plan:  # what the frozen layers give has no room after all
            plan = made.plan
            announce(plan, made.device, reporter, first=first)
        if spare:
            spare, less = False, with_less_memory(made, reporter)
            if less is not None:
                first, plan = (first or plan) if checkpoints.newest is not None else first, less
                del made  # before the next one is there beside it
                continue
        try:
            with ranks.together(order, plan, checkpoints.newest, reporter):
                result = loop.train(
                    made.objective, made.data, made.spec.training, plan, made.device, reporter, checkpoints,
                    kind=made.recipe.kind,
                )  # fmt: skip
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)
            before, less = plan, with_less_memory(made, reporter)
            if less is None:
                raise does_not_fit(made) from error
            plan = less
            if checkpoints.newest is not None:
                first = first or before  # the run goes on, otherwise than it began
            del made  # before the next one is there beside it
        else:
            return _finish(made, result, order, reporter)


class _NotMine(Checkpoints):
    """The checkpoints of a run whose first process writes them."""

    def save(self, contents: Contents, **_: Any) -> None:
        """Leave it to the first process."""


def follow(told: ranks.Told, ready: Callable[[], None], give_up: Callable[[JobFault], NoReturn]) -> None:
    """Train beside the first process of a run, from the same plan and checkpoint."""
    order, plan, reporter = told.order, told.plan, Reporter()
    if plan.device == "cuda":
        torch.cuda.set_device(told.rank)
        order = order.model_copy(update={"device": f"cuda:{told.rank}"})
    newest = Path(order.checkpoint) if order.checkpoint else None
    try:
        with not_training():
            made = start(assemble(order, reporter, plan=plan), order, reporter)
        ready()
        with distributed.joined(Path(told.store), told.rank, plan.world_size, plan.device):
            try:
                loop.train(
                    made.objective, made.data, made.spec.training, plan, made.device, reporter,
                    _NotMine(Path(order.scratch), reporter, newest=newest), kind=made.recipe.kind,
                )  # fmt: skip
            except Exception as error:
                # Said before the group is left, which on a GPU may hang: the others are still at work in it.
                give_up(error if isinstance(error, JobFault) else translated(error, reporter))
    except JobFault as fault:
        give_up(fault)
    except Exception as error:
        give_up(translated(error, reporter))


def plans_of(order: Order, checkpoints: Checkpoints) -> tuple[Plan | None, Plan | None]:
    """Give the plan under which was computed what there is, by which exactness is judged, and the one to go on with."""
    committed = Plan.model_validate(order.plan) if order.plan is not None else None
    saved = checkpoints.load()
    if saved is None:
        return committed, committed
    before = Plan.model_validate(saved.state["plan"])
    return before, latest(committed, before)


def _epochs_done(plan: Plan, checkpoints: Checkpoints) -> int:
    """Count the whole epochs behind the checkpoint to go on from; only what is cached for epochs asks for it."""
    saved = checkpoints.load() if plan.prefix_views else None
    return saved.state["run"]["step"] // plan.steps_per_epoch if saved is not None else 0


def _finish(made: Assembly, result: Result, order: Order, reporter: Reporter) -> Finished:
    """Evaluate on the test split, show, export."""
    if result.outcome not in ("succeeded", "stopped"):
        return Finished(outcome=result.outcome, metrics=result.metrics, best=result.best)
    scratch, metrics = Path(order.scratch), dict(result.metrics)
    details: dict[str, Any] = {}
    for split, source in (("validation", made.data.validation), ("test", made.data.test)):
        if source is None or (split == "validation" and made.recipe.kind == "pretrain"):
            continue
        # The test figures are those of the weights as their user runs them, in plain float32: bf16 moves a few samples
        # in ten thousand over a boundary.
        plan = made.plan.model_copy(update={"precision": "float32"}) if split == "test" else made.plan
        ticker = Ticker(reporter, f"evaluate {split}", fraction=1.0)
        plain = compute.exact_float32() if split == "test" and plan.device == "cuda" else nullcontext()
        with plain:
            found = evaluate.outputs(made.objective, source, made.data, plan, made.device, ticker)
        numbers = {f"{split}/{name}": value for name, value in evaluate.measure(found).items()}
        metrics |= numbers
        details[split] = evaluate.details(found, made.info.classes)
        if split == "test":
            reporter.send(Metrics(rows=tuple((name, result.step, value) for name, value in numbers.items())))
    files = show.drawn(made, scratch, reporter)
    model = _export(made, scratch, metrics, details, order)
    summary: dict[str, Any] = {
        "ended_by": result.ended_by, "steps": result.step, "epochs": result.epoch,
        "seconds": round(result.seconds, 2), "samples_per_second": round(result.samples_per_second, 1),
        "labels": {"train": int((made.data.train.labels >= 0).sum())} if made.recipe.requires.labels else {},
        **details,
    }  # fmt: skip
    if made.recipe.requires.labels and made.data.validation is not None:
        summary["labels"]["validation"] = int((made.data.validation.labels >= 0).sum())
    return Finished(
        outcome=result.outcome, result=summary, metrics=metrics, best=result.best, files=tuple(files), model=model
    )


def _export(
    made: Assembly, scratch: Path, metrics: dict[str, float | None], details: dict[str, Any], order: Order
) -> MadeModel:
    objective = cast(Any, made.objective)
    facts = {
        "recipe": f"{made.recipe.name} {made.recipe.version}",
        "dataset": made.facts.id,
        "training samples": f"{len(made.data.train)}",
        "started from": made.network.source,
        "job": order.job,
        "seed": str(made.spec.training.seed),
    }
    title = made.spec.name or f"{made.recipe.name} on {made.facts.id}"
    return export(
        scratch, objective.backbone, getattr(objective, "head", None), config=made.config(), card=Card(title, facts),
        metrics=metrics, details=details,
    )  # fmt: skip
