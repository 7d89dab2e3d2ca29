"""A run with no server: from a spec and a folder of images to the files of its model."""

import argparse
import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from app.domain.errors import JobFault, UserFault
from app.domain.models import ModelConfig
from app.domain.presets import laid_under
from worker import catalogue, ingest
from worker.ingest.dataset import LIMITS
from worker.report import BaseModelInput, Failed, Finished, Message, Order, Reporter
from worker.trainer import alone
from worker.trainer.process import carry_out
from worker.trainer.trouble import translated


def run(arguments: argparse.Namespace) -> int:
    """Train from a spec and a folder of images, with no server; progress as JSON lines on stdout."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    scratch, cache = out / ".work", Path(arguments.cache).expanduser() if arguments.cache else out / ".cache"

    def listener(message: Message) -> None:
        print(message.model_dump_json(), flush=True)

    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    reporter = Reporter(listener=listener)
    threads = arguments.threads or max(1, torch.get_num_threads() // (arguments.processes or 1))
    try:
        model = local_model(Path(arguments.model)) if arguments.model else None
        spec = without_server(read_body(Path(arguments.spec)), model)
        alone.check(spec, None, model.config if model is not None else None)  # before the data is read
        data = scratch / "data"
        data.mkdir(parents=True, exist_ok=True)
        if arguments.data.startswith("builtin:"):
            dataset = ingest.ingest_builtin(
                arguments.data.removeprefix("builtin:"), data, cache, reporter=reporter, threads=threads
            )
        else:
            dataset = ingest.ingest_folder(arguments.data, data, reporter=reporter, threads=threads)
        checked = alone.check(spec, dataset.facts, model.config if model is not None else None)
        for doubt in alone.doubts(checked, dataset.facts):
            reporter.event("spec.doubtful", doubt, level="warning")
        order = local_order(spec, dataset.facts, scratch, cache, threads=threads, device=arguments.device, model=model)
    except JobFault as fault:
        reporter.send(Failed(error=fault.failure("ingest")))
        return 1
    except OSError as error:
        reporter.send(Failed(error=translated(error, reporter).failure("ingest")))
        return 1
    order = order.model_copy(update={"processes": arguments.processes, "cache_bytes": arguments.cache_bytes})
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
        said = last.model_dump(mode="json", include={"outcome", "result", "metrics"})
        (out / "result.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        listener(last)
    if (scratch / alone.CHILDREN).is_dir():
        shutil.copytree(scratch / alone.CHILDREN, out / alone.CHILDREN, dirs_exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return code


def read_body(path: Path) -> dict[str, Any]:
    """Read the body of a job from a file.

    Raises:
        UserFault: there is no such file, or something else than a JSON object in it.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserFault(f"{path}: {error}", code="invalid_spec", phase="read") from error
    if not isinstance(body, dict):
        raise UserFault(f"{path} is not a JSON object.", code="invalid_spec", phase="read")
    return body


def without_server(body: dict[str, Any], model: BaseModelInput | None) -> dict[str, Any]:
    """Leave out of a job's body what stands here beside it: the dataset, and the id of the model.

    Raises:
        UserFault: it starts from a server's model, and nothing was given in its place.
    """
    named = isinstance(body.get("model"), str)
    if named and model is None:
        raise UserFault(
            f"model: there is no server here that knows {body['model']}.", code="no_such_model", phase="read",
            hint="Give the folder of its files with --model.",
        )  # fmt: skip
    return {name: value for name, value in body.items() if name != "dataset" and not (named and name == "model")}


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
