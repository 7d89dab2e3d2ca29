"""Warm trainers: a dead zygote is replaced, changed code is picked up, nothing secret is inherited."""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import app.domain
import worker.supervisor.warm
from app.domain.errors import SystemFault
from tests.fakes import COMMAND
from tests.waiting import Clock, dead, until
from worker.report import Go, Limits, Order
from worker.supervisor.environment import clean_environment
from worker.supervisor.server import KILLED, Server, Trainer
from worker.supervisor.warm import Warm

pytestmark = pytest.mark.worker


@pytest.fixture
def catalogues() -> "queue.Queue[Any]":
    return queue.Queue()


@pytest.fixture
def warm(tmp_path: Path, catalogues: "queue.Queue[Any]") -> Iterator[Warm]:
    warm = Warm(cache=tmp_path / "cache", command=COMMAND, on_ready=catalogues.put)
    warm.refresh()
    assert warm.ready.wait(60)
    yield warm
    warm.close()


def start(
    warm: Warm, folder: Path, *, gpus: tuple[str, ...] = (), check: Callable[[], None] = lambda: None, **fake: Any
) -> Trainer:
    folder.mkdir()
    limits = Limits(max_entries=1, max_entry_bytes=1, max_unpacked_bytes=1, max_ratio=2, max_pixels=1)
    order = Order(
        job="a", attempt=1, kind="finetune", recipe="fake", spec={"params": {"fake": fake}}, scratch=str(folder),
        cache=str(folder), cache_bytes=0, threads=1, limits=limits,
    )  # fmt: skip
    path = folder / "order.json"
    path.write_text(order.model_dump_json())
    trainer = warm.start(order=path, log_file=folder / "log", threads=1, gpus=gpus, check=check)
    trainer.connection.sendall(Go().model_dump_json().encode() + b"\n")
    return trainer


def test_the_catalogue_arrives_and_trainers_start_and_end(
    warm: Warm, catalogues: "queue.Queue[Any]", tmp_path: Path
) -> None:
    assert {recipe["name"] for recipe in catalogues.get(timeout=60)["recipes"]} >= {"image_classification"}
    first, second = start(warm, tmp_path / "1", steps=2), start(warm, tmp_path / "2", exit_at=0, exit_code=9)
    assert (first.wait(60), second.wait(60)) == (0, 9)
    for trainer in (first, second):
        trainer.kill()  # harmless by now
        trainer.connection.close()


def test_a_dead_zygote_ends_its_trainers_and_is_replaced(
    warm: Warm, catalogues: "queue.Queue[Any]", tmp_path: Path
) -> None:
    catalogues.get(timeout=60)
    trainer = start(warm, tmp_path / "1", hang_at=0)
    with open(f"/proc/{trainer.pid}/stat", encoding="ascii") as file:
        zygote = int(file.read().rpartition(")")[2].split()[1])
    os.kill(zygote, signal.SIGKILL)
    assert trainer.wait(60) == KILLED
    assert dead(trainer.pid)
    trainer.connection.close()
    assert catalogues.get(timeout=60)
    assert warm.ready.wait(60)
    again = start(warm, tmp_path / "2", steps=1)
    assert again.wait(60) == 0
    again.connection.close()


def test_without_a_zygote_a_start_is_a_system_fault(warm: Warm, tmp_path: Path) -> None:
    warm.close()
    until(lambda: not warm.ready.is_set())
    with pytest.raises(SystemFault, match="warm trainer"):
        start(warm, tmp_path / "1")


def test_changed_code_brings_a_new_zygote_and_spares_who_is_running(
    warm: Warm, catalogues: "queue.Queue[Any]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogues.get(timeout=60)
    old = start(warm, tmp_path / "1", hold_at=1)
    warm.refresh()
    assert catalogues.empty()  # nothing changed
    monkeypatch.setattr(worker.supervisor.warm, "code_signature", lambda: "edited")
    warm.refresh()
    assert catalogues.get(timeout=60)
    new = start(warm, tmp_path / "2", steps=1)
    assert new.wait(60) == 0
    assert old.code is None  # it runs on under the code that it began with
    retired = warm._zygote
    old.kill()
    assert old.wait(60) == KILLED
    assert retired is not None
    assert not retired.dead.is_set()
    for trainer in (old, new):
        trainer.connection.close()


def test_a_zygote_that_cannot_start_is_tried_again_with_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(worker.supervisor.warm, "time", clock)
    warm = Warm(cache=tmp_path, command=("/bin/sh", "-c", "exit 3"))
    for pause in (2.0, 4.0, 8.0):
        warm.refresh()
        assert warm._coming is not None
        reader = f"server-{warm._coming.process.pid}"
        until(lambda: reader not in {thread.name for thread in threading.enumerate()})  # noqa: B023
        clock.now += pause - 0.01
        warm.refresh()
        assert warm._coming is None  # the next one is not due yet
        clock.now += 0.02
    assert not warm.ready.is_set()
    warm.close()


def visible(trainer: Trainer) -> str:
    """Read which GPUs a trainer says that it sees."""
    with trainer.connection.makefile("rb") as lines:
        for line in lines:
            said = json.loads(line)
            if said.get("code") == "trainer.began":
                return said["data"]["visible"]
    raise AssertionError("it never began")


@pytest.fixture
def on_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Warm]]:
    """Start servers on a host with the GPUs 0 and 1, all of which a process sees unless it is told otherwise."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_FAKE_CARDS", "0,1")
    made: list[Warm] = []

    def make(command: tuple[str, ...] = COMMAND) -> Warm:
        made.append(Warm(cache=tmp_path / "cache", gpus=["0", "1"], command=command))
        made[0].refresh()
        assert made[0].ready.wait(60)
        return made[0]

    yield make
    made[0].close()


def test_the_zygote_of_a_host_with_gpus_sees_none_and_so_does_its_trainer(
    on_cards: Callable[..., Warm], tmp_path: Path
) -> None:
    warm = on_cards()  # a zygote that sees a GPU runs threads of it and refuses to serve
    assert warm._zygote is not None
    zygote = psutil.Process(warm._zygote.process.pid)
    assert zygote.environ()["CUDA_VISIBLE_DEVICES"] == ""
    trainer = start(warm, tmp_path / "1", hang_at=1)
    assert visible(trainer) == ""
    assert psutil.Process(trainer.pid).ppid() == zygote.pid
    trainer.kill()
    assert trainer.wait(60) == KILLED
    trainer.connection.close()


def test_one_gpu_is_served_by_a_spare_that_is_replaced_and_two_by_a_new_process(
    on_cards: Callable[..., Warm], tmp_path: Path
) -> None:
    warm = on_cards()
    until(lambda: len(warm._spares) == 2 and all(spare.ready.is_set() for spare in warm._spares.values()))
    spare = warm._spares["1"]
    one = start(warm, tmp_path / "1", gpus=("1",), exit_at=1, exit_code=5)
    assert one.pid == spare.process.pid
    assert visible(one) == "1"
    assert one.wait(60) == 5
    assert warm._spares["1"] is not spare
    spares = {spare.process.pid for spare in warm._spares.values()}
    both = start(warm, tmp_path / "2", gpus=("0", "1"), hang_at=1)
    assert both.pid not in spares
    assert visible(both) == "0,1"
    assert psutil.Process(both.pid).ppid() == os.getpid()  # no fork of the zygote
    assert "--device" in psutil.Process(both.pid).cmdline()
    killed = start(warm, tmp_path / "3", gpus=("0",), hang_at=1)
    killed.kill()
    assert killed.wait(60) == KILLED
    warm.close()
    assert both.wait(60) == KILLED
    for trainer in (one, both, killed):
        trainer.connection.close()


def with_cuda(begins: str) -> tuple[str, ...]:
    """Give the command of servers that do this in a shell before they start, where they have GPUs."""
    return ("/bin/sh", "-c", f'case "$2" in --device) {begins};; esac; exec "$0" -m tests.fakes "$@"', sys.executable)


def test_a_spare_that_is_still_starting_is_waited_for(on_cards: Callable[..., Warm], tmp_path: Path) -> None:
    warm = on_cards(with_cuda("sleep 1"))
    spare = until(lambda: warm._spares.get("0"))
    assert not spare.ready.is_set()
    trainer = start(warm, tmp_path / "1", gpus=("0",), steps=1)
    assert trainer.pid == spare.process.pid
    assert trainer.wait(60) == 0
    trainer.connection.close()


def test_what_a_job_with_gpus_leaves_behind_in_its_group_is_killed(
    on_cards: Callable[..., Warm], tmp_path: Path
) -> None:
    warm = on_cards()
    trainer = start(warm, tmp_path / "1", gpus=("0", "1"), hang_at=0, child_seconds=600)
    assert visible(trainer) == "0,1"
    (child,) = psutil.Process(trainer.pid).children()
    os.kill(trainer.pid, signal.SIGKILL)
    assert trainer.wait(60) == KILLED
    assert dead(child.pid), "it held GPUs, which are given to the next job now"
    trainer.connection.close()


def test_a_start_that_is_no_longer_wanted_ends_with_the_process_that_was_to_be(
    on_cards: Callable[..., Warm], tmp_path: Path
) -> None:
    class Unwanted(Exception):
        pass

    looks = iter([None, None])

    def check() -> None:
        if next(looks, "over") == "over":
            raise Unwanted

    warm = on_cards(with_cuda("exec sleep 600"))
    spare = until(lambda: warm._spares.get("0"))
    with pytest.raises(Unwanted):
        start(warm, tmp_path / "1", gpus=("0",), check=check)
    assert spare.dead.wait(60)
    assert dead(spare.process.pid)
    assert spare not in warm._taken


BROKEN = with_cuda("exit 3")  # a host whose GPUs are broken: whatever starts CUDA ends at once


def test_a_job_whose_gpus_do_not_start_is_a_system_fault(on_cards: Callable[..., Warm], tmp_path: Path) -> None:
    warm = on_cards(BROKEN)
    for name, gpus in (("1", ("0",)), ("2", ("0", "1"))):
        with pytest.raises(SystemFault, match="does not answer"):
            start(warm, tmp_path / name, gpus=gpus)
    trainer = start(warm, tmp_path / "3", steps=1)  # the processor still works
    assert trainer.wait(60) == 0
    trainer.connection.close()


def test_a_spare_that_dies_is_tried_again_with_pauses(
    on_cards: Callable[..., Warm], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(worker.supervisor.warm, "time", clock)
    warm = on_cards(BROKEN)
    real, started = warm._server, list[tuple[str, ...]]()

    def server(gpus: tuple[str, ...], *rest: Any) -> Server:
        started.append(gpus)
        return real(gpus, *rest)

    def died(times: int) -> bool:
        return [warm._pauses[gpu].failures for gpu in ("0", "1")] == [times, times]

    until(lambda: died(1))
    monkeypatch.setattr(warm, "_server", server)
    for deaths, pause in ((1, 2.0), (2, 4.0), (3, 8.0)):
        until(lambda: died(deaths))  # noqa: B023
        clock.now += pause - 0.01
        warm.refresh()
        assert started == []  # the next ones are not due yet
        clock.now += 0.02
        warm.refresh()
        assert started == [("0",), ("1",)]
        started.clear()
    until(lambda: died(4))


def test_a_trainer_inherits_no_credentials(tmp_path: Path) -> None:
    source = {
        "PATH": "/bin", "HOME": "/root", "LC_ALL": "C", "CUDA_HOME": "/cuda", "HTTPS_PROXY": "proxy",
        "TUNEYARD_DATABASE_URL": "secret", "TUNEYARD_REDIS_URL": "secret", "TUNEYARD_ADMIN_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret", "PGPASSWORD": "secret", "REDIS_PASSWORD": "secret",
    }  # fmt: skip
    environment = clean_environment(source, tmp_path)
    assert "secret" not in environment.values()
    assert not any(name.startswith("TUNEYARD_") for name in environment)
    assert {"PATH", "HOME", "LC_ALL", "CUDA_HOME", "HTTPS_PROXY"} <= set(environment)
    assert environment["TORCH_HOME"].startswith(str(tmp_path))


def test_gpus_have_the_numbers_of_the_driver_and_cublas_repeats_itself(tmp_path: Path) -> None:
    environment = clean_environment({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, tmp_path)
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    chosen = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}  # repeats itself as well, with less memory
    assert clean_environment(chosen, tmp_path)["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_signature_of_the_code_follows_a_changed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in ((worker, "worker"), (app.domain, "domain")):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(package, "__path__", [str(tmp_path / name)])
    files = [tmp_path / name for name in ("worker/recipe.py", "worker/architectures.json", "domain/spec.py")]
    for file in files:
        file.write_text("1")
    for seconds, file in enumerate(files, start=1):
        before = worker.supervisor.warm.code_signature()
        assert worker.supervisor.warm.code_signature() == before
        os.utime(file, (seconds, seconds))  # older than the others, as from an archive
        assert worker.supervisor.warm.code_signature() != before, file
