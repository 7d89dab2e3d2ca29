"""Two processes of one run, forked from a test: what each sees of a batch, a loss or a buffer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from worker.parts import distributed


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run `work(rank)` in two processes that have found each other; give what each returned (numbers, no tensors)."""
    context = torch.multiprocessing.get_context("fork")  # a fresh interpreter would take seconds to import torch
    results = context.Queue()

    def one(rank: int) -> None:
        with distributed.joined(folder / "meet", rank, 2, "cpu"):
            results.put((rank, work(rank)))

    ranks = [context.Process(target=one, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=300) for _ in ranks)
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(2)]
