"""What a frozen prefix makes of every sample, computed once and kept in bfloat16, so that epochs start behind it."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worker.data.shelf import Shelf
from worker.data.source import Data, Source, ahead, in_order
from worker.parts import compute
from worker.parts.fold import folded, is_plain
from worker.parts.seed import generator
from worker.parts.tuning import Plan
from worker.recipe import Batch
from worker.report import Reporter
from worker.ticker import Ticker

VIEWS = 4  # fixed views of each sample where inputs are augmented: more passes would cost more than they bring
BATCH_PIXELS = 64 * 64 * 64  # of a forward pass: what still fits a processor's caches runs fastest


@dataclass(frozen=True)
class Features:
    """Rows of cached prefix outputs, `views` of them per sample, one chosen by each batch in turn."""

    values: Tensor  # bfloat16 [views, rows, …]
    source: Source
    slow: bool = False

    @property
    def labels(self) -> Tensor:
        """int64 [rows]."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Give the rows of these numbers, each in another of its views from epoch to epoch."""
        views = (rows + epoch) % len(self.values)
        return {"prefix": self.values[views, rows].float(), "label": self.labels[rows], "index": rows}


def view_count(*, augmented: bool, epochs: int) -> int:
    """Say how many views of each sample are worth caching; 0 is no cache, because epochs would be as cheap."""
    if not augmented:
        return 1
    return VIEWS if epochs > 2 * VIEWS else 0


def cache_prefix(
    source: Source, data: Data, prefix: nn.Module, *, views: int, seed: int, augmented: bool, plan: Plan,
    device: torch.device, key: str, shelf: Shelf, reporter: Reporter,
) -> Features | None:  # fmt: skip
    """Compute the prefix's output for every row; None where it would not fit the shelf's budget.

    Args:
        key: names the source's pixels, their order and the prefix's weights; the rest is added here.
    """

    prefix.eval()
    size = batch_size(plan)
    first = source.batch(torch.arange(min(2, len(source))))
    runs = folded(prefix, compute.laid_out(data.ready(first, device), plan)["image"])
    dtype = torch.float32
    if runs is not prefix and plan.precision == "bfloat16" and is_plain(runs):
        dtype = torch.bfloat16
        runs = runs.to(dtype)

    def forward(batch: Batch, view: int, start: int) -> Tensor:
        draws = generator(seed, "view", view, start, device=device) if augmented else None
        ready = compute.laid_out(data.ready(batch, device, draws), plan)
        return runs(ready["image"].to(dtype)).to(torch.bfloat16).cpu()

    tick = Ticker(reporter, "features")
    with torch.inference_mode(), compute.autocast(plan, device):
        shape = forward(first, 0, 0).shape[1:]
        rows = len(source)
        needed = views * rows * shape.numel() * 2
        name = hashlib.sha256(
            f"{key}/{views}/{seed if augmented else ''}/{plan.precision}/{tuple(shape)}".encode()
        ).hexdigest()[:40]
        if not shelf.has_room(name, needed):
            return None

        def make(folder: Path) -> None:
            with (folder / "values").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(needed, 1))
            values = torch.from_numpy(np.memmap(folder / "values", np.int16, "r+", shape=(views, rows, *shape)))
            for view in range(views):
                start = 0
                for batch_rows, batch in ahead(source, in_order(source, size), view):
                    made = forward(batch, view, start)
                    values[view, start : start + len(batch_rows)] = made.view(torch.int16)
                    start += len(batch_rows)
                    tick(view * rows + start, views * rows)

        folder = shelf.get(name, needed, make)
    stored = np.memmap(folder / "values", np.int16, "c", shape=(views, rows, *shape))
    return Features(torch.from_numpy(stored).view(torch.bfloat16), source)


def batch_size(plan: Plan) -> int:
    """Choose how many samples pass a frozen network at once."""
    if plan.device == "cuda":
        return 512
    return max(16, min(256, BATCH_PIXELS // plan.image_size**2))


def digest(module: nn.Module) -> str:
    """Hash the weights of a module, names included."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_rows(rows: Tensor) -> str:
    """Hash row numbers."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
