"""The trainer's process: an order in, files in scratch and one last word out. No SQL, no credentials, no network.

`python -m worker.trainer run spec.json --data FOLDER --out DIR` runs the same without any server, and
`python -m worker.trainer rank` is one of the other processes of a run, which the first one starts.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from app.domain.errors import JobFault, ResourceFault, SystemFault, UserFault
from app.domain.models import ModelConfig
from app.domain.presets import laid_under, refused_preset
from worker import alone, application, catalogue, evaluate, ingest, loop, measure, orchestration, ranks, show
from worker.announce import announce
from worker.assembly import Assembly, assemble, start
from worker.checkpoint import Checkpoints, Contents
from worker.disk import is_full
from worker.ingest import model as imported
from worker.ingest.dataset import LIMITS
from worker.loop import Result
from worker.parts import distributed
from worker.parts.export import Card, export
from worker.parts.tuning import Plan
from worker.report import BaseModelInput, Failed, Finished, MadeModel, Message, Metrics, Order, Reporter
from worker.ticker import Ticker

TRACE_LINES = 30
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def main(order_path: str, connection: socket.socket) -> int:
    """Carry out the order in a file and report over `connection`; 0 after Finished, 1 after Failed."""
    order = Order.model_validate_json(Path(order_path).read_text(encoding="utf-8"))
    reporter = Reporter(connection, silence_seconds=order.silence_seconds)
    return carry_out(order, reporter)


def carry_out(order: Order, reporter: Reporter) -> int:
    """Do what an order says and report exactly one Finished or Failed."""
    try:
        finished = _perform(order, reporter)
    except JobFault as fault:
        reporter.send(Failed(error=fault.failure("train")))
        return 1
    except Exception as error:
        reporter.send(Failed(error=_translated(error, reporter).failure("train")))
        return 1
    reporter.send(finished)
    return 0


def _perform(order: Order, reporter: Reporter) -> Finished:
    try:
        match order.recipe:
            case "ingest":
                return Finished(outcome="succeeded", dataset=ingest.run(order, reporter))
            case "import_model":
                return Finished(outcome="succeeded", model=imported.run(order, reporter))
            case "measure":
                return Finished(outcome="succeeded", result=measure.run(order, reporter))
            case _ if catalogue.recipe(order.recipe).plan is not None:
                return orchestration.run(order, reporter)
            case _ if order.kind == "apply":
                return application.run(order, reporter)
            case _:
                return train(order, reporter)
    except ingest.Interrupted as interrupted:
        return Finished(outcome=_OUTCOMES[interrupted.wanted])


_OUTCOMES: dict[str, Any] = {"cancel": "cancelled", "stop": "cancelled", "pause": "paused", "drain": "drained"}


def train(order: Order, reporter: Reporter) -> Finished:
    """Train as ordered; after running out of memory in a way that takes less, from the last checkpoint."""
    newest = Path(order.checkpoint) if order.checkpoint else None
    checkpoints = Checkpoints(Path(order.scratch), reporter, newest=newest)
    first = plan = _plan_of(order, checkpoints)
    while True:
        made = assemble(order, reporter, plan=plan)
        plan = made.plan
        announce(plan, made.device, order, reporter, first=first)
        try:
            made = start(made, order, reporter)
            with ranks.together(order, plan, checkpoints.newest, reporter):
                result = loop.train(
                    made.objective, made.data, made.spec.training, plan, made.device, reporter, checkpoints,
                    kind=made.recipe.kind,
                )  # fmt: skip
            return _finish(made, result, order, reporter)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            plan = _with_less_memory(made, error, reporter)


class _NotMine(Checkpoints):
    """The checkpoints of a run whose first process writes them."""

    def save(self, contents: Contents, **_: Any) -> None:
        """Leave it to the first process."""


def _follow(told: ranks.Told, ready: Callable[[], None]) -> None:
    """Train beside the first process of a run, from the same plan and checkpoint."""
    order, plan, reporter = told.order, told.plan, Reporter()
    if plan.device == "cuda":
        torch.cuda.set_device(told.rank)
        order = order.model_copy(update={"device": f"cuda:{told.rank}"})
    newest = Path(order.checkpoint) if order.checkpoint else None
    try:
        made = start(assemble(order, reporter, plan=plan), order, reporter)
        ready()
        with distributed.joined(Path(told.store), told.rank, plan.world_size, plan.device):
            loop.train(
                made.objective, made.data, made.spec.training, plan, made.device, reporter,
                _NotMine(Path(order.scratch), reporter, newest=newest), kind=made.recipe.kind,
            )  # fmt: skip
    except JobFault:
        raise
    except Exception as error:
        raise _translated(error, reporter) from error


def _plan_of(order: Order, checkpoints: Checkpoints) -> Plan | None:
    """Give the plan to use again: the checkpoint's, which may have been halved since the first attempt's."""
    saved = checkpoints.load()
    if saved is not None:
        return Plan.model_validate(saved.state["plan"])
    return Plan.model_validate(order.plan) if order.plan is not None else None


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


def _with_less_memory(made: Assembly, error: Exception, reporter: Reporter) -> Plan:
    """Halve the micro-batch, where that is the same computation but for batch norm; else keep fewer activations.

    Raises:
        ResourceFault: neither is left to do; the hint says what would fit.
    """
    plan = made.plan
    micro = plan.batch_size // plan.accumulate
    each = plan.world_size  # processes that share it
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    if bool(cast(Any, made.objective).couples_batch):
        if not plan.checkpoint_activations:
            reporter.event(
                "memory.activations_recomputed",
                f"Out of memory: the loss of {made.recipe.name} ties the {micro} samples of a batch together, so it is "
                "not split; activations are computed a second time instead of being kept, which takes about a third "
                "longer.", level="warning", batch_size=micro,
            )  # fmt: skip
            why = {**plan.reasons, "checkpoint_activations": f"a batch of {micro} did not fit into memory without"}
            return plan.model_copy(update={"checkpoint_activations": True, "compile": False, "reasons": why})
        fits = measure.largest_batch(made, micro // 2 // each)
        raise ResourceFault(
            f"A batch of {micro} does not fit into memory even when activations are computed twice, and it is not "
            f"split, because the loss of {made.recipe.name} ties its samples together.", code="out_of_memory",
            hint=f"Set training.batch_size to {fits * each}." if fits else "Use a smaller network or smaller images.",
        ) from error  # fmt: skip
    if micro == each or micro % (2 * each):
        raise ResourceFault(
            f"A micro-batch of {micro} does not fit into memory.", code="out_of_memory",
            hint=f"Set training.batch_size to {2 * (plan.batch_size // 2)} or less." if micro > each
            else "Use a smaller network or smaller images.",
        ) from error  # fmt: skip
    reporter.event(
        "memory.micro_batch_halved",
        f"Out of memory: each batch of {plan.batch_size} now goes in parts of {micro // 2} whose gradients add up. "
        "Batch norm sees the smaller parts.", level="warning", micro_batch=micro // 2,
    )  # fmt: skip
    why = {**plan.reasons, "accumulate": f"a micro-batch of {micro} did not fit into memory"}
    return plan.model_copy(update={"accumulate": plan.accumulate * 2, "reasons": why})


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error).lower() for text in _OUT_OF_MEMORY
    )


def _translated(error: Exception, reporter: Reporter) -> JobFault:
    """Class what nobody foresaw; the end of the trace goes into the job's log."""
    if is_full(error):
        return ResourceFault(
            f"The disk of the worker is full: {error}.", code="disk_full", hint="Free some space, then /retry."
        )
    if _is_out_of_memory(error):
        return ResourceFault(f"Out of memory: {error}", code="out_of_memory", hint="Use a smaller network or images.")
    trace = "".join(traceback.format_exception(error)).splitlines()[-TRACE_LINES:]
    reporter.event("trainer.crashed", f"{type(error).__name__}: {error}", level="error", trace=trace)
    return SystemFault(f"The trainer crashed: {type(error).__name__}: {error}", code="crash")


def run(arguments: argparse.Namespace) -> int:
    """Train from a spec and a folder of images, with no server; progress as JSON lines on stdout."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    scratch, cache = out / ".work", Path(arguments.cache).expanduser() if arguments.cache else out / ".cache"

    def listener(message: Message) -> None:
        print(message.model_dump_json(), flush=True)

    reporter = Reporter(listener=listener)
    threads = arguments.threads or max(1, torch.get_num_threads() // (arguments.processes or 1))
    try:
        spec = json.loads(Path(arguments.spec).read_text(encoding="utf-8"))
        if not isinstance(spec, dict):
            raise UserFault(f"{arguments.spec} is not a JSON object.", code="invalid_spec")
        model = local_model(Path(arguments.model)) if arguments.model else None
        data = scratch / "data"
        data.mkdir(parents=True, exist_ok=True)
        if arguments.data.startswith("builtin:"):
            dataset = ingest.ingest_builtin(
                arguments.data.removeprefix("builtin:"), data, cache, reporter=reporter, threads=threads
            )
        else:
            dataset = ingest.ingest_folder(arguments.data, data, reporter=reporter, threads=threads)
        order = local_order(spec, dataset.facts, scratch, cache, threads=threads, device=arguments.device, model=model)
    except JobFault as fault:
        reporter.send(Failed(error=fault.failure("ingest")))
        return 1
    except (OSError, json.JSONDecodeError) as error:
        reporter.send(Failed(error=UserFault(f"{arguments.spec}: {error}", code="invalid_spec").failure("read")))
        return 1
    order = order.model_copy(update={"processes": arguments.processes})
    finished: list[Finished] = []
    kept = Reporter(
        listener=lambda message: finished.append(message) if isinstance(message, Finished) else listener(message)
    )
    with _stopped_by_interrupt(kept):
        code = alone.carry_out(order, kept, carry_out)
    for last in finished:
        made = (*last.files, *(last.model.files if last.model else ()))
        for file in made:
            shutil.copyfile(scratch / file.file, out / file.name)
        listener(last)
    if (scratch / alone.CHILDREN).is_dir():
        shutil.copytree(scratch / alone.CHILDREN, out / alone.CHILDREN, dirs_exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return code


@contextlib.contextmanager
def _stopped_by_interrupt(reporter: Reporter) -> Iterator[None]:
    """Take Ctrl-C as the wish to stop, which keeps the best model so far; a second one ends the process."""
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        reporter.want("stop")

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def local_order(
    spec: dict[str, Any], facts: Any, scratch: Path, cache: Path, *, threads: int, device: str = "cpu",
    model: BaseModelInput | None = None,
) -> Order:  # fmt: skip
    """Make the order of a run without a server."""
    found = catalogue.recipe(str(spec.get("recipe")))
    if (refused := refused_preset(spec, found.name)) is not None:
        raise UserFault(f"training.preset: {refused.message}", code="preset")
    body = laid_under(spec, found.name, found.defaults)
    return Order(
        job="job_local", attempt=1, kind=found.kind, recipe=found.name, spec=body, dataset=facts, scratch=str(scratch),
        cache=str(cache), cache_bytes=50 * 2**30, threads=threads, device=device, limits=LIMITS, model=model,
    )  # fmt: skip


def local_model(folder: Path) -> BaseModelInput:
    """Take the files of a model, as a job or a download leaves them, to start from without a server.

    Raises:
        UserFault: a file is missing, or its description cannot be read.
    """
    weights, described = folder / "model.safetensors", folder / "config.json"
    try:
        config = ModelConfig.model_validate_json(described.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserFault(f"{described} does not describe a model: {error}", code="no_such_model") from error
    if not weights.is_file():
        raise UserFault(f"There is no file {weights}.", code="no_such_model")
    return BaseModelInput(id="mdl_local", config=config, weights=str(weights))


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run", help="train from a spec and a folder of images, with no server")
    verb.add_argument("spec", help="the body of a job as a JSON file; `dataset` may be left out")
    verb.add_argument("--data", required=True, help="a folder or archive of images, or builtin:NAME")
    verb.add_argument("--out", required=True, help="where the model goes")
    verb.add_argument("--model", help="a folder with model.safetensors and config.json to start from or to use")
    verb.add_argument("--cache", help="where decoded images are kept; in the output folder by default")
    verb.add_argument("--threads", type=int, default=0, help="of each process; 0 shares what torch takes by itself")
    verb.add_argument("--processes", type=_positive, help="that train together; on GPUs, one for each")
    verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    verb.set_defaults(work=run)
    rank = verbs.add_parser("rank", help="be one of the other processes of a run; the first one starts it")
    rank.set_defaults(work=lambda _: os._exit(ranks.follow(_follow)))  # at once: the first one waits
    return parser.parse_args(given)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1 process trains")
    return number


if __name__ == "__main__":
    arguments = _arguments(sys.argv[1:])
    raise SystemExit(arguments.work(arguments))
