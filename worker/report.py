"""The wire between a supervisor and its trainer: JSON lines over one socket. Torch-free; both sides import it.

The supervisor opens with nothing: the order lies in a file whose path the trainer got when it was forked. Then

    trainer -> supervisor   Planned, Progress, Metrics, Event, Saved, Finished, Failed
    supervisor -> trainer   Tick (every second or two; carries what the user wants), Go (the plan is committed)

Large things never cross the wire: the trainer writes files below its scratch folder and names them. A trainer that
hears no tick for `silence_seconds` exits by itself, so a dead supervisor leaves no orphan.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.domain.datasets import DatasetFacts, Shard
from app.domain.errors import Failure
from app.domain.models import ModelConfig

Wish = Literal["run", "pause", "stop", "cancel", "drain"]
Outcome = Literal["succeeded", "stopped", "paused", "cancelled", "drained", "children"]


class Message(BaseModel):
    """One line on the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Message):
    """What a trainer process may use while it opens bytes from strangers."""

    max_entries: int
    max_entry_bytes: int
    max_unpacked_bytes: int
    max_ratio: int
    max_pixels: int


class BaseModelInput(Message):
    """A model to start from, staged on local disk."""

    id: str
    config: ModelConfig
    weights: str  # path of model.safetensors; empty for a job that only plans others


class Order(Message):
    """Everything a trainer is told: what to run, on which staged files, within which bounds."""

    job: str
    attempt: int
    kind: Literal["pretrain", "finetune", "apply", "internal"]
    recipe: str  # for internal jobs: ingest, import_model, measure
    spec: dict[str, Any]
    plan: dict[str, Any] | None = None  # of an earlier attempt; used again as far as this machine can
    dataset: DatasetFacts | None = None  # its shards carry `path`
    model: BaseModelInput | None = None
    upload: str | None = None  # path of the raw bytes, for ingest and import
    upload_name: str | None = None
    checkpoint: str | None = None  # path of the newest checkpoint, to go on from
    spare_memory: bool = False  # the kernel ended the attempt before this one, because memory ran out
    children: tuple[dict[str, Any], ...] = ()  # finished children of an orchestrating job
    stopping: bool = False  # an orchestrating job shall make the best of these, and no further ones
    scratch: str
    cache: str  # shared by the jobs of this host: decoded images, features, compiled code
    cache_bytes: int
    threads: int
    device: str = "cpu"  # cpu, cuda:0 …
    processes: int | None = None  # that train together; null: one for each GPU of the job, one without
    limits: Limits
    silence_seconds: float = 20.0


class Planned(Message):
    """What `auto` came to. The supervisor commits it and answers Go before step 0."""

    type: Literal["planned"] = "planned"
    plan: dict[str, Any]
    fingerprint: dict[str, Any]
    exact: bool = True


class Progress(Message):
    """How far the run is; also the sign of life that a hung run does not give."""

    type: Literal["progress"] = "progress"
    phase: str
    fraction: float
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    samples_per_second: float | None = None
    eta_seconds: float | None = None


class Metrics(Message):
    """Numbers, as `(name, step, value)`; null is one that was not finite."""

    type: Literal["metrics"] = "metrics"
    rows: tuple[tuple[str, int, float | None], ...]


class Event(Message):
    """One line for the job's log."""

    type: Literal["event"] = "event"
    code: str
    message: str
    level: Literal["info", "warning", "error"] = "info"
    data: dict[str, Any] = {}


class Saved(Message):
    """A checkpoint lies complete and synced under `file`, relative to scratch."""

    type: Literal["saved"] = "saved"
    file: str
    step: int
    epoch: int
    metrics: dict[str, float | None]
    best_step: int | None  # of the best weights so far, this step or an earlier one; None where nothing tells


class MadeFile(Message):
    """A file of the job, relative to scratch."""

    name: str
    file: str
    media_type: str


class MadeModel(Message):
    """The model that a run made; its files lie in scratch: model.safetensors, config.json, README.md, metrics.json."""

    config: ModelConfig
    parameters: int
    metrics: dict[str, float | None]
    files: tuple[MadeFile, ...]


class MadeDataset(Message):
    """What ingest made; the paths of its shards are relative to scratch."""

    facts: DatasetFacts
    format: str
    report: dict[str, Any]
    shards: tuple[Shard, ...]


class Finished(Message):
    """The run came to an end that is no failure; sent once, after everything it names was written."""

    type: Literal["finished"] = "finished"
    outcome: Outcome
    result: dict[str, Any] | None = None
    metrics: dict[str, float | None] = {}
    best: dict[str, Any] | None = None
    files: tuple[MadeFile, ...] = ()
    model: MadeModel | None = None
    dataset: MadeDataset | None = None
    adopts: str | None = None  # the id of a child's model that this job gives as its own
    children: tuple[dict[str, Any], ...] = ()  # with outcome `children`: the specs of the next round


class Failed(Message):
    """The run cannot go on."""

    type: Literal["failed"] = "failed"
    error: Failure


class Tick(Message):
    """The supervisor lives, and this is what is wanted."""

    type: Literal["tick"] = "tick"
    wanted: Wish


class Go(Message):
    """The plan is committed; step 0 may run."""

    type: Literal["go"] = "go"


Report = Annotated[Planned | Progress | Metrics | Event | Saved | Finished | Failed, Field(discriminator="type")]
Instruction = Annotated[Tick | Go, Field(discriminator="type")]
read_report: TypeAdapter[Report] = TypeAdapter(Report)
read_instruction: TypeAdapter[Instruction] = TypeAdapter(Instruction)


class Reporter:
    """The trainer's end of the wire.

    Without a socket (`tuneyard run`) it hands every message to `listener` instead, and nothing is ever wanted but to
    run on. `send` never blocks training for long: lines are short and the supervisor reads at once.
    """

    def __init__(
        self,
        connection: socket.socket | None = None,
        *,
        silence_seconds: float = 20.0,
        listener: Callable[[Message], None] | None = None,
    ) -> None:
        self._connection, self._listener = connection, listener
        self._silence_seconds = silence_seconds
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._heard = time.monotonic()
        self._wanted: Wish = "run"
        if connection is None:
            self._go.set()
        else:
            threading.Thread(target=self._read, name="reporter-read", daemon=True).start()
            threading.Thread(target=self._watch, name="reporter-watch", daemon=True).start()

    @property
    def wanted(self) -> Wish:
        """What the supervisor last said; read at every step boundary, costs nothing."""
        return self._wanted

    def want(self, wish: Wish) -> None:
        """Wish from inside the process: Ctrl-C of `tuneyard run`, or a test."""
        self._wanted = wish

    def send(self, message: Message) -> None:
        """Send one message; a broken wire ends the process, because nobody could use its work any more."""
        if self._connection is None:
            if self._listener:
                self._listener(message)
            return
        line = message.model_dump_json().encode() + b"\n"
        with self._lock:
            try:
                self._connection.sendall(line)
            except OSError:
                os._exit(75)

    def planned(self, plan: dict[str, Any], fingerprint: dict[str, Any], *, exact: bool = True) -> None:
        """Report the plan and wait until it is committed."""
        self.send(Planned(plan=plan, fingerprint=fingerprint, exact=exact))
        self._go.wait()

    def event(
        self, code: str, message: str, *, level: Literal["info", "warning", "error"] = "info", **data: Any
    ) -> None:
        """Write one line to the job's log."""
        self.send(Event(code=code, message=message, level=level, data=data))

    def _read(self) -> None:
        assert self._connection is not None
        with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                instruction = read_instruction.validate_python(json.loads(line))
                self._heard = time.monotonic()
                if isinstance(instruction, Go):
                    self._go.set()
                else:
                    self._wanted = instruction.wanted
        os._exit(75)  # the supervisor is gone

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._silence_seconds / 4))
            if time.monotonic() - self._heard > self._silence_seconds:
                os._exit(75)
