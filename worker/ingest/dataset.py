"""From an upload to a dataset: recognise, read, decode once, write shards, report."""

import contextlib
import hashlib
import os
import queue
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from app.domain.datasets import DatasetFacts, OnError, Shard
from app.domain.errors import DataFault, ResourceFault, UserFault
from worker.disk import is_full
from worker.ingest import Interrupted, builtin, formats, sandbox
from worker.ingest.archive import Bytes, Problem, Refused, shown
from worker.ingest.inspectors import Inspector, Verdicts, vet_all
from worker.ingest.report import NAMED, Report
from worker.ingest.rows import Rows, Source
from worker.ingest.shards import ShardWriter
from worker.report import Limits, MadeDataset, Order, Progress, Reporter

FOLDER = "dataset"  # where the shards lie, below scratch
LIMITS = Limits(
    max_entries=2_000_000,
    max_entry_bytes=512 * 2**20,
    max_unpacked_bytes=200 * 2**30,
    max_ratio=200,
    max_pixels=50_000_000,
)  # fmt: skip  (for folders on this machine; an order carries its own)
_BETWEEN_REPORTS = 0.5
_NAMES_IN_FAULT = 10
_NAMES_IN_EVENT = 200
_UNPACKING = 0.2  # of the progress, when there is something to unpack or to fetch first

Open = Callable[[Path, Callable[[float], None]], Source]


def run(order: Order, reporter: Reporter) -> MadeDataset:
    """Ingest what an order names; see `worker.ingest.run`."""
    spec = order.spec

    def open_source(work: Path, tick: Callable[[float], None]) -> Source:
        if spec.get("builtin"):
            return builtin.read(str(spec["builtin"]), Path(order.cache), work, order.limits, tick)
        if order.upload is None:
            raise UserFault("a dataset is made of an upload or of a builtin set", hint="give `upload` or `builtin`")
        return formats.read(
            Path(order.upload), order.upload_name or "the upload", work, spec.get("task"), order.limits, tick
        )

    return _make(
        open_source, Path(order.scratch), on_error=spec.get("on_error") or "skip", asked=spec.get("task"),
        id=str(spec.get("dataset") or "ds_new"), limits=order.limits, threads=order.threads, reporter=reporter,
    )  # fmt: skip


def ingest_folder(
    source: Path, scratch: Path, task: str | None, on_error: OnError, limits: Limits, threads: int, reporter: Reporter
) -> MadeDataset:
    """Ingest a folder or an archive on this machine; see `worker.ingest.ingest_folder`."""
    if not source.exists():
        raise UserFault(f"there is nothing at {source}", code="no_such_folder", hint="give a folder or an archive")
    scratch.mkdir(parents=True, exist_ok=True)
    made = _make(
        lambda work, tick: formats.read(source, source.name, work, task, limits, tick), scratch,
        on_error=on_error, asked=task, id="ds_local", limits=limits, threads=threads, reporter=reporter,
    )  # fmt: skip
    return absolute(made, scratch)


def ingest_builtin(name: str, scratch: Path, cache: Path, threads: int, reporter: Reporter) -> MadeDataset:
    """Ingest a standard set on this machine; see `worker.ingest.ingest_builtin`."""
    scratch.mkdir(parents=True, exist_ok=True)
    made = _make(
        lambda work, tick: builtin.read(name, cache, work, LIMITS, tick), scratch, on_error="skip", asked=None,
        id="ds_local", limits=LIMITS, threads=threads, reporter=reporter,
    )  # fmt: skip
    return absolute(made, scratch)


def absolute(made: MadeDataset, scratch: Path) -> MadeDataset:
    """Give the same dataset with absolute paths."""
    shards = tuple(
        shard.model_copy(
            update={
                name: str(scratch.absolute() / value)
                for name in ("path", "thumbnails_path")
                if (value := getattr(shard, name)) is not None
            }
        )
        for shard in made.shards
    )
    return made.model_copy(update={"shards": shards, "facts": made.facts.model_copy(update={"shards": shards})})


def _make(
    open_source: Open, scratch: Path, *, on_error: OnError, asked: str | None, id: str, limits: Limits, threads: int,
    reporter: Reporter,
) -> MadeDataset:  # fmt: skip
    clock, threads = _Clock(reporter), threads or os.cpu_count() or 1
    work = Path(tempfile.mkdtemp(prefix=".ingest-", dir=scratch))
    try:
        with sandbox.restrict(limits, threads):
            source = open_source(work, lambda part: clock.tick("unpack", _UNPACKING * part))
            try:
                return _write(source, work, scratch, on_error, asked, id, limits, threads, clock)
            finally:
                source.close()
    except MemoryError as error:
        raise ResourceFault(
            "reading the upload needs more memory than is allowed", code="out_of_memory", phase="ingest",
            hint="write smaller row groups, or pack the images as files",
        ) from error  # fmt: skip
    except OSError as error:
        if is_full(error):
            raise ResourceFault(
                "the disk of the worker is full", code="disk_full", phase="ingest", hint="free some space and retry"
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(
    source: Source, work: Path, scratch: Path, on_error: OnError, asked: str | None, id: str, limits: Limits,
    threads: int, clock: "_Clock",
) -> MadeDataset:  # fmt: skip
    folder = work / FOLDER
    folder.mkdir()
    writer, report = ShardWriter(folder, source.classes), Report(source)
    try:
        # Closed by name: left to the garbage collector, its threads were joined wherever that happened to run, once
        # within the start of another thread, which then waited for ever.
        with contextlib.closing(_inspected(source, limits, threads)) as chunks:
            _read_all(source, writer, report, on_error, chunks, clock)
        shards = writer.close()
    except BaseException:
        writer.abandon()
        raise
    facts, summary = report.facts(), report.json(shards)
    shutil.rmtree(scratch / FOLDER, ignore_errors=True)
    folder.rename(scratch / FOLDER)  # whole or not at all
    shards = tuple(_moved(shard) for shard in shards)
    _tell(clock.reporter, report, summary)
    labelled = bool(source.classes) and asked != "unlabelled_images"
    return MadeDataset(
        facts=DatasetFacts(
            id=id,
            sha256=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
            task="image_classification" if labelled else "unlabelled_images",
            classes=source.classes,
            features={"image": "image", **({"label": "class_label"} if source.classes else {})},
            shards=shards,
            **facts,
        ),
        format=source.format,
        report=summary,
        shards=shards,
    )


def _read_all(
    source: Source, writer: ShardWriter, report: Report, on_error: OnError, chunks: Iterator["_Inspected"],
    clock: "_Clock",
) -> None:  # fmt: skip
    """Write what is good, name what is bad. Raises `DataFault` when nothing is left, or when nothing may be bad."""
    done = 0
    _refuse_bad(report.bad, on_error, full=_NAMES_IN_FAULT)
    for found in chunks:
        reasons = sorted(found.verdicts.reasons.items())
        report.bad.extend(Problem(shown(found.rows.names[at]), reason) for at, reason in reasons)
        rows, data, verdicts = _good(found)
        writer.add(rows.split, data, rows.names, rows.labels, verdicts.thumbnails)
        report.add(rows.split, verdicts.table, rows.labels, sum(map(len, data)))
        _refuse_bad(report.bad, on_error, full=_NAMES_IN_FAULT)
        done += rows.bytes
        clock.tick("decode", _UNPACKING + (1 - _UNPACKING) * min(1.0, done / max(source.bytes, 1)), report.samples)
    _refuse_bad(report.bad, on_error, full=1)
    if not report.samples:
        raise DataFault(
            f"none of the {len(report.bad)} images can be used: {_listed(report.bad)}", code="no_usable_images",
            phase="ingest", hint="give whole JPEG, PNG, WebP or GIF files",
        )  # fmt: skip


def _good(found: "_Inspected") -> "_Inspected":
    """Leave out the rows that have a reason."""
    rows, data, verdicts = found
    if not verdicts.reasons:
        return found
    good = [at for at in range(len(data)) if at not in verdicts.reasons]
    thumbnails = {new: verdicts.thumbnails[at] for new, at in enumerate(good) if at in verdicts.thumbnails}
    names, labels = [rows.names[at] for at in good], [rows.labels[at] for at in good]
    return _Inspected(
        replace(rows, names=names, labels=labels), [data[at] for at in good],
        Verdicts(verdicts.table[good], {}, thumbnails),
    )  # fmt: skip


class _Inspected(NamedTuple):
    rows: Rows
    data: Sequence[Bytes]
    verdicts: Verdicts


def _inspected(source: Source, limits: Limits, threads: int) -> Generator[_Inspected]:
    """Read and decode in parallel; what comes out is in the order of the rows, and a few chunks at most are held."""
    idle: queue.SimpleQueue[Inspector] = queue.SimpleQueue()
    started: list[Inspector] = []

    def inspect(rows: Rows) -> _Inspected:
        found = rows.read()
        data = [b"" if isinstance(item, Refused) else item for item in found]
        if rows.made:
            return _Inspected(rows, data, vet_all(data, limits))
        try:
            inspector = idle.get_nowait()
        except queue.Empty:
            inspector = Inspector(limits)
            started.append(inspector)
        verdicts = inspector.inspect(data)
        idle.put(inspector)
        verdicts.reasons.update({at: item.reason for at, item in enumerate(found) if isinstance(item, Refused)})
        return _Inspected(rows, data, verdicts)

    waiting: deque[Future[_Inspected]] = deque()
    try:
        with ThreadPoolExecutor(threads, "ingest") as pool:
            try:
                for rows in source.rows:
                    waiting.append(pool.submit(inspect, rows))
                    if len(waiting) > threads + 1:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        for inspector in started:
            inspector.close()


class _Clock:
    """Reports progress at most twice a second and listens to what is wanted."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self._began, self._last = time.monotonic(), 0.0

    def tick(self, phase: str, fraction: float, samples: int | None = None) -> None:
        if self.reporter.wanted != "run":
            raise Interrupted(self.reporter.wanted)
        now = time.monotonic()
        if now - self._last < _BETWEEN_REPORTS:
            return
        self._last = now
        rate = samples / max(now - self._began, 1e-3) if samples else None
        self.reporter.send(Progress(phase=phase, fraction=fraction, samples_per_second=rate))


def _refuse_bad(bad: Sequence[Problem], on_error: OnError, *, full: int) -> None:
    """With `on_error: fail`, end the run as soon as there is a message's worth of bad files, or at the end."""
    if on_error == "fail" and len(bad) >= full:
        raise DataFault(
            f"{len(bad)} files cannot be used: {_listed(bad)}" if full == 1
            else f"at least {len(bad)} files cannot be used: {_listed(bad)}",
            code="bad_files", phase="ingest", hint="mend or remove them, or upload with on_error=skip",
        )  # fmt: skip


def _listed(bad: Sequence[Problem]) -> str:
    rest = f"; and {len(bad) - _NAMES_IN_FAULT} more" if len(bad) > _NAMES_IN_FAULT else ""
    return "; ".join(f"{problem.name}: {problem.reason}" for problem in bad[:_NAMES_IN_FAULT]) + rest


def _moved(shard: Shard) -> Shard:
    thumbnails = shard.thumbnails_path and f"{FOLDER}/{Path(shard.thumbnails_path).name}"
    assert shard.path is not None
    return shard.model_copy(update={"path": f"{FOLDER}/{Path(shard.path).name}", "thumbnails_path": thumbnails})


def _tell(reporter: Reporter, report: Report, summary: dict[str, Any]) -> None:
    """Write the outcome to the job's log; it also names the bad files for which the report has no room."""
    for start in range(NAMED, len(report.bad), _NAMES_IN_EVENT):
        files = [problem._asdict() for problem in report.bad[start : start + _NAMES_IN_EVENT]]
        reporter.event("bad_files", f"{len(files)} more files were left out", level="warning", files=files)
    for warning in summary["warnings"]:
        reporter.event("dataset_warning", warning, level="warning")
    splits = ", ".join(f"{part['samples']} {name}" for name, part in summary["splits"].items())
    reporter.event(
        "dataset_made", f"images: {splits}",
        samples=summary["samples"], bad=summary["bad"]["count"], ignored=summary["ignored"]["count"],
    )  # fmt: skip
