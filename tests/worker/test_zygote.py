"""The zygote: forks quickly, tells how its children ended, leaves nothing behind, leaks nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.domain.datasets import DatasetFacts
from tests.fakes import COMMAND
from tests.waiting import dead, until
from worker.report import Go, Limits, Order, Tick
from worker.supervisor.environment import clean_environment
from worker.trainer.local import local_order

pytestmark = pytest.mark.worker


class Client:
    """A bare client of the protocol, independent of worker.supervisor.warm."""

    def __init__(self, folder: Path, command: tuple[str, ...] = COMMAND) -> None:
        self.folder = folder
        self.control, theirs = socket.socketpair()
        self.control.settimeout(60)
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
                env={"PATH": os.environ["PATH"], "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        self.lines = self.control.makefile("rb")

    def answer(self) -> dict[str, Any]:
        line = self.lines.readline()
        return json.loads(line) if line else {}

    def order(self, name: str, **fake: Any) -> socket.socket:
        scratch = self.folder / name
        scratch.mkdir()
        limits = Limits(max_entries=1, max_entry_bytes=1, max_unpacked_bytes=1, max_ratio=2, max_pixels=1)
        order = Order(
            job=name, attempt=1, kind="finetune", recipe="fake", spec={"params": {"fake": fake}}, scratch=str(scratch),
            cache=str(self.folder), cache_bytes=0, threads=1, limits=limits, silence_seconds=600,
        )  # fmt: skip
        path = scratch / "order.json"
        path.write_text(order.model_dump_json())
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        request = {"order": str(path), "log": str(scratch / "log"), "threads": 1, "environment": {"GIVEN": "yes"}}
        with theirs:
            socket.send_fds(self.control, [json.dumps(request).encode() + b"\n"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        self.control.shutdown(socket.SHUT_RDWR)
        self.process.wait(60)
        self.lines.close()
        self.control.close()


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Client]:
    client = Client(tmp_path)
    assert client.answer()["ready"]["recipes"]
    yield client
    client.close()


def go(wire: socket.socket) -> list[dict[str, Any]]:
    """Let a trainer run to its end and give all that it said."""
    wire.sendall(Go().model_dump_json().encode() + b"\n")
    with wire, wire.makefile("rb") as lines:
        return [json.loads(line) for line in lines]


def test_a_trainer_is_forked_runs_and_its_end_is_told(zygote: Client) -> None:
    wire = zygote.order("a", steps=3)
    pid = zygote.answer()["pid"]
    said = go(wire)
    assert said[-1]["type"] == "finished"
    assert zygote.answer() == {"pid": pid, "exit": 0}


def test_codes_and_signals_are_told_apart(zygote: Client) -> None:
    for name, fake, expected in (
        ("exits", {"exit_at": 0, "exit_code": 7}, 7),
        ("dies", {"kill_at": 0, "signal": int(signal.SIGSEGV)}, -signal.SIGSEGV),
    ):
        wire = zygote.order(name, **fake)
        pid = zygote.answer()["pid"]
        go(wire)
        assert zygote.answer() == {"pid": pid, "exit": expected}
    assert "about to exit" in (zygote.folder / "exits" / "log").read_text()
    assert "Segmentation fault" in (zygote.folder / "dies" / "log").read_text()


def test_a_trainer_leads_its_own_group_and_sees_no_descriptor_or_variable_but_its_own(zygote: Client) -> None:
    other = zygote.order("other", hold_at=1)
    other_pid = zygote.answer()["pid"]
    wire = zygote.order("a", hold_at=1)
    pid = zygote.answer()["pid"]
    wire.sendall(Go().model_dump_json().encode() + b"\n")
    with wire.makefile("rb") as lines:
        said = [json.loads(lines.readline()) for _ in range(2)]
    assert os.getpgid(pid) == pid
    log = str(zygote.folder / "a" / "log")
    opened = {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    assert [opened.pop(number) for number in range(3)] == ["/dev/null", log, log]
    (wire_of_its_own,) = opened.values()
    assert wire_of_its_own.startswith("socket:")
    assert set(said[1]["data"]["environment"]) <= {"PATH", "OPENBLAS_NUM_THREADS", "GIVEN", "LC_CTYPE"}
    assert "GIVEN" in said[1]["data"]["environment"]
    os.killpg(pid, signal.SIGKILL)
    os.killpg(other_pid, signal.SIGKILL)
    assert {zygote.answer()["exit"], zygote.answer()["exit"]} == {-signal.SIGKILL}
    wire.close()
    other.close()


def test_what_is_forked_has_taken_a_first_step_and_runs_one_thread(tmp_path: Path) -> None:
    script = (
        "import json, os, sys; from worker.trainer import zygote; published = zygote.prepare(); import torch\n"
        "print(json.dumps({'recipes': len(published['recipes']), 'dynamo': 'torch._dynamo' in sys.modules,"
        " 'running': len(os.listdir('/proc/self/task')), 'threads': torch.get_num_threads()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(dict(os.environ), tmp_path), stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said.pop("recipes") > 0
    assert said == {"dynamo": True, "running": 1, "threads": 1}


def test_the_first_job_of_a_dataset_imports_nothing_more(digits: DatasetFacts, tmp_path: Path) -> None:
    script = (
        "import sys; from worker.trainer import zygote; zygote.prepare()\n"
        "from worker.trainer import process; from worker.report import Order, Reporter\n"
        "known = set(sys.modules)\n"
        "for order in sys.argv[1:]:\n"
        "    assert process.carry_out(Order.model_validate_json(order), Reporter()) == 0\n"
        "print(sorted(set(sys.modules) - known))"
    )
    orders = [
        local_order(
            {
                "recipe": recipe, "model": {"architecture": "small_cnn", "width": 0.25, "image_size": 16},
                "training": {"steps": 2, "batch_size": 32},
            }, digits, tmp_path / recipe, tmp_path / "cache", threads=1, device="cpu",
        ).model_dump_json() for recipe in ("image_classification", "simclr")
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *orders],
        env=clean_environment(dict(os.environ), tmp_path), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_a_trainer_leaves_behind_in_its_group_is_killed(zygote: Client) -> None:
    wire = zygote.order("a", hold_at=1, child_seconds=600)
    pid = zygote.answer()["pid"]
    wire.sendall(Go().model_dump_json().encode() + b"\n")
    until(lambda: psutil.Process(pid).children())
    child = psutil.Process(pid).children()[0].pid
    wire.sendall(Tick(wanted="stop").model_dump_json().encode() + b"\n")
    assert zygote.answer()["exit"] == 0
    until(lambda: dead(child))
    wire.close()


def test_the_end_of_the_control_socket_is_the_end_of_everything(zygote: Client) -> None:
    wire = zygote.order("a", hang_at=0)
    pid = zygote.answer()["pid"]
    zygote.control.shutdown(socket.SHUT_RDWR)
    assert zygote.process.wait(60) == 0
    until(lambda: dead(pid))
    wire.close()


def test_a_killed_zygote_takes_its_trainers_along(zygote: Client) -> None:
    wire = zygote.order("a", hang_at=0)
    pid = zygote.answer()["pid"]
    zygote.process.kill()
    until(lambda: dead(pid))
    wire.close()


def test_a_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    # The supervisor's part is played by a process that holds both the control socket and the trainer's wire.
    script = (
        "import sys, time; from pathlib import Path; from tests.worker.test_zygote import Client\n"
        "client = Client(Path(sys.argv[1])); client.answer(); wire = client.order('a', hang_at=0)\n"
        "print(client.process.pid, client.answer()['pid'], flush=True); time.sleep(600)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    zygote, trainer = map(int, supervisor.stdout.readline().split())
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    until(lambda: dead(zygote) and dead(trainer))


def test_fifty_forks_in_a_row(zygote: Client) -> None:
    for index in range(50):
        wire = zygote.order(str(index), steps=1)
        pid = zygote.answer()["pid"]
        assert go(wire)[-1]["type"] == "finished"
        assert zygote.answer() == {"pid": pid, "exit": 0}


def test_a_silent_supervisor_is_noticed_by_the_trainer(zygote: Client) -> None:
    limits = Limits(max_entries=1, max_entry_bytes=1, max_unpacked_bytes=1, max_ratio=2, max_pixels=1)
    order = Order(
        job="a", attempt=1, kind="finetune", recipe="fake", spec={"params": {"fake": {"hang_at": 0}}},
        scratch=str(zygote.folder), cache=str(zygote.folder), cache_bytes=0, threads=1, limits=limits,
        silence_seconds=0.5,
    )  # fmt: skip
    path = zygote.folder / "order.json"
    path.write_text(order.model_dump_json())
    ours, theirs = socket.socketpair()
    request = {"order": str(path), "log": str(zygote.folder / "log"), "threads": 1, "environment": {}}
    with theirs:
        socket.send_fds(zygote.control, [json.dumps(request).encode() + b"\n"], [theirs.fileno()])
    pid = zygote.answer()["pid"]
    ours.sendall(Tick(wanted="run").model_dump_json().encode() + b"\n")
    assert zygote.answer() == {"pid": pid, "exit": 75}
    ours.close()
