"""The fork server of trainers: everything imported, one step warmed up, then a fork takes hundredths of a second.

`multiprocessing`'s forkserver hands its alive descriptor to every child and outlives a killed worker, so this is our
own. The protocol, over the one socket whose descriptor is the first argument:

    zygote -> supervisor     {"ready": {"recipes": […], "architectures": […]}}
    supervisor -> zygote     {"order": path, "environment": {…}, "threads": n, "log": path}   with one descriptor
    zygote -> supervisor     {"pid": n}, then, when that trainer is gone, {"pid": n, "exit": code}; a signal is negative

Each message is one line of JSON. The end of the socket is the end of every trainer. The zygote is started with no GPU
in sight (`CUDA_VISIBLE_DEVICES` is empty), because the first backward pass starts a thread for each. With `--device`
the process is instead for one job on the GPUs that it sees, and cannot be forked once CUDA runs: it initialises CUDA,
serves one order in itself and exits.
"""

import array
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from worker.trainer.lifeline import die_with_parent

Main = Callable[[str, socket.socket], int]
Published = dict[str, list[dict[str, Any]]]
LINE_BYTES = 1 << 20


def main(arguments: list[str]) -> int:
    """Serve the real trainer."""
    control = socket.socket(fileno=int(arguments[0]))
    published = prepare()
    from worker.trainer import process

    if "--device" in arguments:
        warm_device()
        return serve_once(control, process.main)
    return serve(control, process.main, published)


def prepare() -> Published:
    """Import all that a first step needs and run one on a single thread; give what is to be published.

    OpenMP does not survive a fork after a parallel region, hence the one thread; without the step, every child would
    spend a second importing what the first backward and the first optimiser step load.
    """
    import torch
    from torch import nn

    torch.set_num_threads(1)
    from worker import catalogue, sources
    from worker.parts.machine import has_bfloat16

    published = catalogue.published()
    sources.digest()  # of the code that was just imported; an update may change the files before a job asks
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, 2))
    network = network.to(memory_format=torch.channels_last)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for build in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = build(network.parameters(), lr=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16()):  # as `auto` will have it
            loss = nn.functional.cross_entropy(network(images), torch.zeros(4, dtype=torch.long))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return published


def warm_device() -> None:
    """Create the CUDA context and load the kernels' libraries."""
    import torch

    a = torch.ones(64, 64, device="cuda")
    torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8, device="cuda"), torch.ones(4, 3, 3, 3, device="cuda"))
    (a @ a).sum().item()


def serve(control: socket.socket, trainer: Main, published: Published) -> int:
    """Fork a trainer for every order until the supervisor is gone, then kill what is left and return."""
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
    if threads != 1:
        raise RuntimeError(f"{threads} threads run in the zygote, and only one survives a fork: find who started them")
    waker, wakened = socket.socketpair()
    for end in (waker, wakened):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which ends us by closing the socket
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the pages that all trainers share
    children: set[int] = set()
    try:
        _send(control, {"ready": published})
        while True:
            readable, _, _ = select.select([control, wakened], [], [])
            if wakened in readable:
                with contextlib.suppress(BlockingIOError):
                    wakened.recv(4096)
                for pid, code in _gone(children):
                    _send(control, {"pid": pid, "exit": code})
            if control in readable:
                request, descriptor = receive(control)
                if request is None or descriptor is None:
                    return 0
                connection = socket.socket(fileno=descriptor)
                parent, pid = os.getpid(), os.fork()
                if pid == 0:
                    _become_trainer(trainer, request, connection, (control, waker, wakened), parent)
                connection.close()
                with contextlib.suppress(OSError):  # done on both sides, so that a kill of the group never comes early
                    os.setpgid(pid, pid)
                children.add(pid)
                _send(control, {"pid": pid})
    except (BrokenPipeError, ConnectionResetError):
        return 0
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


def serve_once(control: socket.socket, trainer: Main) -> int:
    """Be the trainer of the first order; the exit status tells the rest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _send(control, {"ready": None})
    request, descriptor = receive(control)
    if request is None or descriptor is None:
        return 0
    _send(control, {"pid": os.getpid()})
    return _run(trainer, request, socket.socket(fileno=descriptor), close=(control,))


def _become_trainer(
    trainer: Main, request: dict[str, Any], connection: socket.socket, close: tuple[socket.socket, ...], parent: int
) -> None:
    """Turn the fresh child into a trainer; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        if os.getppid() != parent:  # it died before we asked to die with it
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        code = _run(trainer, request, connection, close=close)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(trainer: Main, request: dict[str, Any], connection: socket.socket, *, close: tuple[socket.socket, ...]) -> int:
    for end in close:
        end.close()
    # Both streams go to one file that the supervisor keeps short: with O_APPEND it may be cut under our hands.
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    faulthandler.enable()
    os.environ.update(request["environment"])
    if "torch" in sys.modules:
        importlib.import_module("torch").set_num_threads(request["threads"])
    return trainer(request["order"], connection)


def _gone(children: set[int]) -> list[tuple[int, int]]:
    """Reap the trainers that ended: their code, or the negative number of the signal."""
    found: list[tuple[int, int]] = []
    for pid in list(children):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        # Not yet reaped, the number still belongs to it: whatever it left running in its group goes first.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        children.discard(pid)
        found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


def receive(control: socket.socket) -> tuple[dict[str, Any] | None, int | None]:
    """Read one line and the descriptor that came with it; (None, None) at the end of the socket.

    The supervisor waits for the answer to an order before it sends another, so a line is never followed by more.
    """
    line, descriptor = b"", None
    while not line.endswith(b"\n"):
        data, ancillary, _, _ = control.recvmsg(LINE_BYTES, socket.CMSG_SPACE(4))
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptor = array.array("i", payload[:4])[0]
                os.set_inheritable(descriptor, False)
        if not data:
            return None, None
        line += data
    return json.loads(line), descriptor


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # taking hundreds of libraries down in order takes seconds, and some complain
