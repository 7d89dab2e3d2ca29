"""What a frozen prefix makes of every sample, computed once and kept in bfloat16, so that epochs start behind it."""

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from app.domain.errors import ResourceFault
from worker.data.rows import Array, cached_rows
from worker.data.shelf import Shelf, entry_key
from worker.data.source import Data, Source, ahead, in_order
from worker.disk import amount
from worker.parts import compute, machine
from worker.parts.fold import folded, is_plain
from worker.parts.memory import in_pieces
from worker.parts.seed import generator
from worker.parts.small_maps import keep_matrices
from worker.parts.tuning import Plan
from worker.recipe import Batch
from worker.report import Reporter
from worker.ticker import Ticker

POLICY = "features-2"  # part of every key; changes with what `cache_prefix` does
# What of a plan decides the bits of a frozen network's output, beside the size of its batches.
DECIDES = {
    "threads", "precision", "memory_format", "float32_matmul", "deterministic", "small_map_products", "mean", "std",
}  # fmt: skip
VIEWS = 4  # fixed views of each sample where inputs are augmented: more passes would cost more than they bring
BATCH_PIXELS = 128 * 64 * 64  # of a forward pass: what still fits a processor's caches runs fastest


@dataclass(frozen=True)
class Prefix:
    """Frozen layers, with what names their output and what that looks like."""

    module: nn.Module
    digest: str
    shape: tuple[int, ...]  # of the output for one image


@dataclass(frozen=True)
class Features:
    """Rows of cached prefix outputs, `views` of them per sample, one chosen by each batch in turn."""

    values: Tensor  # bfloat16 [views, rows, …]
    source: Source
    seconds: float  # that computing them took, now or when they were first wanted
    found: bool  # computed before
    slow: bool = False

    @property
    def labels(self) -> Tensor:
        """int64 [rows]."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Give the rows of these numbers, each in another of its views from epoch to epoch."""
        drawn = (rows + epoch) % len(self.values) * len(self) + rows
        prefix = self.values.flatten(0, 1).index_select(0, drawn).float()  # half the time of indexing by two numbers
        return {"prefix": prefix, "label": self.labels[rows], "index": self.source.numbers(rows)}

    def numbers(self, rows: Tensor) -> Tensor:
        """Give the sample numbers of these rows."""
        return self.source.numbers(rows)


def choose_views(
    plan: Plan, wanted: Callable[[int], Mapping[str, int]], *, augmented: bool, shelf: Shelf, beside: Collection[str],
    reporter: Reporter,
) -> tuple[int, str]:  # fmt: skip
    """Say how many views of each sample are cached, and why; 0 is no cache.

    Args:
        wanted: gives the names of the entries that so many views would be, and their bytes.
        beside: the entries of the shelf that the run reads as well.
    """
    if augmented and plan.epochs <= 2 * VIEWS:
        return 0, f"{VIEWS} views of each sample would cost {VIEWS} passes, and there are only {plan.epochs} epochs"
    views = VIEWS if augmented else 1
    entries, tick, waits = wanted(views), Ticker(reporter, "features"), count(1)
    short = shelf.shortage(entries, beside=beside, waiting=lambda: tick(next(waits)))
    if short is not None:
        needed = sum(entries.values())
        return 0, _not_cached(f"what the frozen layers give would take {amount(needed)}, and {short}", needed, reporter)
    times = "once" if views == 1 else f"{views} times"
    return views, f"the frozen layers run {times} over each sample, not in every epoch"


def without_views(plan: Plan, needed: int, fault: ResourceFault, reporter: Reporter) -> Plan:
    """Give the plan of a run whose cache found no room after all."""
    why = f"what the frozen layers give found no room when it was computed: {fault.message.rstrip('.')}"
    why = _not_cached(why, needed, reporter)
    return plan.model_copy(update={"prefix_views": 0, "reasons": {**plan.reasons, "prefix_views": why}})


def _not_cached(why: str, needed: int, reporter: Reporter) -> str:
    reporter.event("features.not_cached", f"The frozen layers run in every epoch: {why}.", bytes=needed)
    return why


def identify(module: nn.Module, plan: Plan, device: torch.device) -> Prefix:
    """Hash frozen layers that lie where they will run, which takes a while, and run them on one image."""
    image = torch.zeros(1, plan.channels, plan.image_size, plan.image_size, device=device)
    with torch.inference_mode():
        made: Tensor = module.eval()(image)
    return Prefix(module, digest(module), tuple(made.shape[1:]))


def entry_of(
    source: Source, prefix: Prefix, *, views: int, seed: int, augmented: bool, plan: Plan, device: torch.device,
    key: Sequence[object],
) -> tuple[str, dict[str, Array]]:  # fmt: skip
    """Name the entry of what a prefix gives for every row, and say what is in it; arguments as for `cache_prefix`."""
    arrays = _arrays(views, len(source), prefix.shape)
    drawn = seed if augmented else None
    return key_of(prefix.digest, plan, device, batch_size(plan), views, drawn, arrays["values"].shape, *key), arrays


def cache_prefix(
    source: Source, data: Data, prefix: Prefix, *, views: int, seed: int, augmented: bool, plan: Plan,
    device: torch.device, key: Sequence[object], shelf: Shelf, reporter: Reporter,
) -> Features:  # fmt: skip
    """Compute the prefix's output for every row, or find it.

    Args:
        key: names the source's pixels, their order, the architecture and the inputs; the rest is added here.

    Raises:
        ResourceFault: there is room for it neither on disk nor in memory.
    """
    size, rows = batch_size(plan), len(source)
    name, arrays = entry_of(
        source, prefix, views=views, seed=seed, augmented=augmented, plan=plan, device=device, key=key
    )  # fmt: skip
    tick = Ticker(reporter, "features")

    def fill(arrays: dict[str, Tensor]) -> None:
        began = time.monotonic()
        first = source.batch(torch.arange(min(2, rows)))
        runs = folded(prefix.module, compute.laid_out(data.ready(first, device), plan)["image"])
        dtype = torch.float32
        if runs is not prefix.module:
            keep_matrices(runs)
        if runs is not prefix.module and plan.precision == "bfloat16" and is_plain(runs):
            dtype = torch.bfloat16
            runs = runs.to(dtype)
        passes = in_pieces(lambda piece: runs(piece["image"].to(dtype)).to(torch.bfloat16).cpu())
        with torch.inference_mode(), compute.autocast(plan, device):
            for view in range(views):
                start = 0
                for batch_rows, batch in ahead(source, in_order(source, size), view, device=device):
                    draws = generator(seed, "view", view, start, device=device) if augmented else None
                    ready = compute.laid_out(data.ready(batch, device, draws), plan)["image"]
                    arrays["values"][view, start : start + len(batch_rows)] = torch.cat(passes({"image": ready}))
                    start += len(batch_rows)
                    tick(view * rows + start, views * rows)
        arrays["seconds"][0] = time.monotonic() - began

    found, made = cached_rows(shelf, name, arrays, fill, tick, processes=plan.world_size)
    return Features(found["values"], source, found["seconds"].item(), found=not made)


def tell(train: Features, validation: Features | None, epochs: int, reporter: Reporter) -> None:
    """Report what the cache costs this attempt, and how long it spares it in the epochs that are still to come."""
    spent = saved = 0.0
    for each in (train, validation):
        if each is not None:
            spent += 0.0 if each.found else each.seconds
            saved += each.seconds / len(each.values) * max(0, _avoided(each, epochs))
    how = "was found, computed before" if train.found else f"was computed in {spent:.1f} s"
    passes = _avoided(train, epochs)
    that = f"{passes} of the {epochs} passes that are still to come are saved, about {saved:.1f} s"
    if passes < 0:
        that = f"that took {-passes} passes more than the {epochs} still to come, and the run goes on as it began"
    reporter.event(
        "features.cached",
        f"What the frozen layers give for {len(train)} samples ({len(train.values)} views each) {how}: {that}.",
        views=len(train.values), samples=len(train), found=train.found, seconds_spent=round(spent, 3),
        seconds_saved=round(saved, 3),
    )  # fmt: skip


def _avoided(cached: Features, epochs: int) -> int:
    """Count the passes over the samples that so many epochs are spared; below 0 computing took more."""
    return epochs - (0 if cached.found else len(cached.values))


def key_of(network: str, plan: Plan, device: torch.device, *more: object) -> str:
    """Name what a frozen network gives, by all that decides its bits: layers, weights, plan and machine.

    Args:
        network: its `digest`.
        more: names the pixels, the architecture, and what is done with them.
    """
    how = plan.model_dump(mode="json", include=DECIDES)
    return entry_key("features", POLICY, network, how, machine.fingerprint(device.type), *more)


def _arrays(views: int, rows: int, shape: tuple[int, ...]) -> dict[str, Array]:
    return {"values": Array(torch.bfloat16, (views, rows, *shape)), "seconds": Array(torch.float64, (1,))}


def batch_size(plan: Plan) -> int:
    """Choose how many samples pass a frozen network at once."""
    if plan.device == "cuda":
        return 512
    return max(16, min(256, BATCH_PIXELS // plan.image_size**2))


def digest(module: nn.Module) -> str:
    """Hash the layers and weights of a module, names included."""
    found = hashlib.sha256(repr(module).encode())
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def digest_rows(rows: Tensor) -> str:
    """Hash row numbers."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()
