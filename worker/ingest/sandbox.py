"""Resource limits of processes that open bytes from strangers."""

import contextlib
import os
import resource
import time
from collections.abc import Iterator

from worker.report import Limits

PARSER_BYTES = 4 * 2**30  # address space on top of what the process has, for archives and Parquet
PARSER_BYTES_A_THREAD = 192 * 2**20  # its stack, its malloc arena, the chunk it reads
CPU_SECONDS = 600  # for one batch of images; the parent is less patient, but it may be gone
_FILES = 512


def decoder_bytes(limits: Limits) -> int:
    """Address space that one image may need: its file twice, its pixels at 16 bits and four channels three times."""
    return 512 * 2**20 + 2 * limits.max_entry_bytes + limits.max_pixels * 24


@contextlib.contextmanager
def restrict(limits: Limits, threads: int = 1) -> Iterator[None]:
    """Bound this process while it reads an upload; the old limits come back afterwards.

    Only soft limits are set: the trainer that ingests inside `tuneyard run` goes on to train.
    """
    before = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE)}
    wanted = {
        resource.RLIMIT_AS: address_space()
        + PARSER_BYTES
        + threads * PARSER_BYTES_A_THREAD
        + 2 * limits.max_entry_bytes,
        resource.RLIMIT_NOFILE: _FILES,
    }
    for kind, (soft, hard) in before.items():
        resource.setrlimit(kind, (_least(wanted[kind], soft, hard), hard))
    try:
        yield
    finally:
        for kind, pair in before.items():
            resource.setrlimit(kind, pair)


def confine(limits: Limits) -> None:
    """Bound this process for good: little memory, no new files, nothing written, no core dump."""
    for kind, wanted in (
        (resource.RLIMIT_AS, address_space() + decoder_bytes(limits)),
        (resource.RLIMIT_NOFILE, 8),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        least = _least(wanted, *resource.getrlimit(kind))
        resource.setrlimit(kind, (least, least))


def allow_cpu() -> None:
    """Let this process run `CPU_SECONDS` more; the kernel ends it then, whoever else is still alive."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = _least(int(time.process_time()) + CPU_SECONDS, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def address_space() -> int:
    """Give the bytes of address space in use; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _least(*limits: int) -> int:
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=resource.RLIM_INFINITY)
