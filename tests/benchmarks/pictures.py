"""Pictures on their way to the network: decoding, augmentation, batches; and a first epoch with a cold cache.

`python -m tests.benchmarks.pictures '{"what": …}'` measures one side in a process of its own.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from tests.benchmarks.pairs import Bench, Numbers, Pair, workload
from tests.benchmarks.sides import THREADS, ours, run
from tests.benchmarks.specs import fine_tune

SECONDS = 6.0
BATCH = 256


def grey(bench: Bench, train: int, *, size: int) -> Path:
    """Give a folder of grey PNGs of this size, made of the pictures once."""
    from PIL import Image

    folder = bench.work / f"grey-{train}-{size}"
    if not folder.exists():
        coloured = bench.part(train)
        half = folder.with_suffix(".half")
        for file in sorted(coloured.glob("train/*/*")):
            target = half / file.relative_to(coloured).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as image:
                image.convert("L").resize((size, size)).save(target)
        half.rename(folder)
    return folder


@workload("first_epoch_32", "s", 1.3, "cost")
def first_epoch(bench: Bench) -> Pair:
    """First epoch with a cold cache (ingest done), against the bare decoder on the same threads and a warm epoch."""
    folder = bench.part(min(bench.samples(), 20_000))
    spec = fine_tune(bench, {"architecture": "small_cnn", "image_size": 32}, epochs=2, batch_size=256)
    bare = run("pictures", {"what": "decode", "folder": str(folder), "threads": THREADS})[-1]["seconds"]
    first, second = ours(spec, bench, folder, cache=bench.work / f"cold-{bench.seed}")["epoch_ends"]
    warm = second["seconds"] - first["seconds"]
    return Pair(first["seconds"], bare + warm, more={"bare_decoder": bare, "warm_epoch": warm})


def _augmentation(bench: Bench, policy: str) -> Pair:
    asked = {"folder": str(bench.part(2000)), "policy": policy, "seconds": SECONDS, "seed": bench.seed}
    mine, theirs = (run("pictures", {"what": what, **asked})[-1]["rate"] for what in ("policy", "v2"))
    return Pair(mine, theirs)


@workload("augment_standard_32", "images/s", 10)
def augment_standard(bench: Bench) -> Pair:
    """The standard policy on a batch, against the same operations of torchvision v2 per image; one core."""
    return _augmentation(bench, "standard")


@workload("augment_simclr_32", "views/s", 10)
def augment_simclr(bench: Bench) -> Pair:
    """SimCLR's view, likewise."""
    return _augmentation(bench, "simclr")


@workload("augment_randaugment_32", "images/s", 3)
def augment_randaugment(bench: Bench) -> Pair:
    """RandAugment (2 of 14 operations, magnitude 9), likewise."""
    return _augmentation(bench, "randaugment")


@workload("loading_timm_32", "images/s", 5)
def loading(bench: Bench) -> Pair:
    """Ready batches from our data path, against timm's loader with 2 workers: crop, mirror, colour, normalise."""
    asked = {
        "folder": str(bench.part(10_000)), "seconds": SECONDS, "seed": bench.seed, "threads": THREADS,
        "ingested": str(bench.work / "ingested"), "cache": str(bench.cache), "out": str(bench.work / "out"),
    }  # fmt: skip
    mine, theirs = (run("pictures", {"what": what, **asked})[-1]["rate"] for what in ("load", "timm"))
    return Pair(mine, theirs)


def _decode(asked: Numbers) -> Numbers:
    """Decode every JPEG of a folder with torchvision.io, from memory, on some threads."""
    import torch
    import torchvision.io.image  # noqa: F401  (registers torch.ops.image)

    # The operator itself: torchvision's function warns of its deprecation on every call, which takes time.
    decode, rgb = torch.ops.image.decode_jpeg.default, 3
    torch.set_num_threads(1)
    files = [bytearray(file.read_bytes()) for file in sorted(Path(asked["folder"]).glob("train/*/*"))]

    def chunk(start: int) -> int:
        made = [decode(torch.frombuffer(data, dtype=torch.uint8), rgb) for data in files[start : start + BATCH]]
        return len(made)

    chunk(0)
    with ThreadPoolExecutor(asked["threads"]) as pool:
        begun = time.perf_counter()
        done = sum(pool.map(chunk, range(0, len(files), BATCH)))
        return {"seconds": time.perf_counter() - begun, "images": done}


def _rate(step: Callable[[int], int], seconds: float) -> Numbers:
    """Call a function for so many seconds after a warm-up; it gives the number of images that it made.

    What a GPU has not finished by then takes its time too.
    """
    import torch

    from tests.benchmarks.stopwatch import clock_of

    for number in range(3):
        step(number)
    settled = clock_of(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
    made, begun = 0, settled()
    for number in count(3):
        made += step(number)
        if time.perf_counter() - begun >= seconds:
            return {"rate": made / (settled() - begun)}
    raise AssertionError


def _pixels(asked: Numbers) -> Any:
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    files = sorted(Path(asked["folder"]).glob("train/*/*"))[:2000]
    return torch.stack([pil_to_tensor(Image.open(file).convert("RGB")) for file in files])


def _policy(asked: Numbers) -> Numbers:
    import torch

    from worker.data import augment
    from worker.data.policy import policy, simclr_view
    from worker.parts import machine

    torch.set_num_threads(1)
    machine.keep_freed_memory()  # as every trainer does
    pixels, draws = _pixels(asked), torch.Generator().manual_seed(asked["seed"])
    if asked["policy"] == "simclr":
        apply: Any = simclr_view(image_size=32, channels=3)
    elif asked["policy"] == "randaugment":
        from worker.data.rand_augment import RandAugment  # pyright: ignore

        apply = RandAugment()
    else:
        apply = policy("standard", image_size=32, channels=3)

    def step(number: int) -> int:
        rows = (torch.arange(BATCH) + number * BATCH) % len(pixels)
        return len(augment.to_float(apply(pixels[rows], draws)))

    return _rate(step, asked["seconds"])


def _v2(asked: Numbers) -> Numbers:
    import torch
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    torch.manual_seed(asked["seed"])
    pixels = _pixels(asked)
    final = v2.ToDtype(torch.float32, scale=True)
    moves: dict[str, list[Any]] = {
        "standard": [
            v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2)], 0.8),
        ],
        "simclr": [
            v2.RandomResizedCrop(32, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        ],
        "randaugment": [v2.RandAugment()],
    }  # fmt: skip
    apply = v2.Compose([*moves[asked["policy"]], final])

    def step(number: int) -> int:
        rows = range(number * 32, number * 32 + 32)
        return len(torch.stack([apply(pixels[row % len(pixels)]) for row in rows]))

    return _rate(step, asked["seconds"])


def _load(asked: Numbers) -> Numbers:
    import torch

    from tests.benchmarks.ours import assembled
    from worker.data.policy import View
    from worker.data.source import ahead
    from worker.parts import compute
    from worker.parts.seed import generator
    from worker.parts.tuning import Plan

    spec = {"recipe": "image_classification", "model": {"architecture": "small_cnn", "image_size": 32},
            "training": {"batch_size": BATCH}, "data": {"validation_fraction": 0.0}}  # fmt: skip
    made = assembled({**asked, "spec": spec})
    plan: Plan = made.plan
    compute.settle(plan)
    # What timm's loader does by default.
    view = View(32, crop_scale=(0.08, 1.0), flip=0.5, jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4)
    data = replace(made.data, prepare=lambda batch, draws: {**batch, "image": view(batch["image"], draws)})

    def batches() -> Iterator[int]:
        for epoch in count():
            order = torch.randperm(len(data.train), generator=generator(0, "order", epoch))
            for number, (rows, batch) in enumerate(ahead(data.train, iter(order.split(BATCH)), epoch)):
                draws = generator(0, "inputs", number, device=made.device)
                yield len(compute.laid_out(data.ready(batch, made.device, draws), plan)["image"][: len(rows)])

    found = batches()
    return _rate(lambda _: next(found), asked["seconds"])


def _timm(asked: Numbers) -> Numbers:
    import torch
    from timm.data import create_dataset, create_loader  # pyright: ignore

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset: Any = create_dataset("", root=asked["folder"] + "/train")
    loader = create_loader(
        dataset, (3, 32, 32), BATCH, is_training=True, num_workers=2, use_prefetcher=device.type == "cuda",
        device=device, persistent_workers=True,
    )  # fmt: skip

    def batches() -> Iterator[int]:
        while True:
            for images, _labels in loader:
                yield len(images)

    found = batches()
    return _rate(lambda _: next(found), asked["seconds"])


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    measures = {"decode": _decode, "policy": _policy, "v2": _v2, "load": _load, "timm": _timm}
    print(json.dumps(measures[wanted["what"]](wanted)))
