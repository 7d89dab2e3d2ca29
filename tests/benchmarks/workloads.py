"""Rates and times of training: each function runs one pair and says what it compared."""

from tests.benchmarks import ceiling, clusters, pictures, quality, service, shares, to_85
from tests.benchmarks.pairs import WORKLOADS, Bench, Numbers, Pair, workload
from tests.benchmarks.sides import MODEL, naive, ours, run, trunk
from tests.benchmarks.specs import NEVER, SGD, fine_tune

__all__ = [
    "WORKLOADS",
    "ceiling",
    "clusters",
    "pictures",
    "quality",
    "service",
    "shares",
    "to_85",
]  # importing them fills it

SECONDS = 15.0  # of training per side, where a rate is compared


def _rate(bench: Bench, architecture: Numbers, batch: int, seconds: float = SECONDS) -> Pair:
    spec = fine_tune(bench, architecture, epochs=1000, batch_size=batch, max_seconds=seconds, **SGD)
    folder = bench.part(10_000)
    fast = ours(spec, bench, folder)
    asked = {**architecture, "workload": "classification", "folder": str(folder), "batch_size": batch,
             "seconds": seconds, "seed": bench.seed}  # fmt: skip
    return Pair(fast["samples_per_second"], naive(asked)["samples_per_second"])


@workload("finetune_resnet18_32", "samples/s", 6, as_good_as="quality_finetune_resnet18_32")
def finetune_resnet18(bench: Bench) -> Pair:
    """Full fine-tune, torchvision stem, 32 px, standard augmentation."""
    return _rate(bench, {"architecture": "resnet18", "image_size": 32}, 128)


@workload("finetune_resnet18_small_stem_32", "samples/s", 1.9, as_good_as="quality_finetune_resnet18_small_stem_32")
def finetune_small_stem(bench: Bench) -> Pair:
    """Full fine-tune, small stem, 32 px."""
    return _rate(bench, {"architecture": "resnet18", "image_size": 32, "stem": "small"}, 64, 20)


@workload("finetune_resnet50_224", "samples/s", 1.9, as_good_as="quality_finetune_resnet50_64")
def finetune_resnet50(bench: Bench) -> Pair:
    """Full fine-tune, 224 px."""
    return _rate(bench, {"architecture": "resnet50", "image_size": 224}, 16, 30)


def _frozen(bench: Bench, trainable: str, samples: int) -> Pair:
    architecture, folder = {"architecture": "resnet18", "image_size": 64}, bench.part(samples, 1000)
    start = trunk(bench, architecture, **SGD)
    spec = _frozen_spec(bench, trainable, epochs=10)
    # A cache of its own: neither decoded images nor features are there yet.
    fast = ours(spec, bench, folder, cache=bench.work / f"cache-{trainable}-{bench.seed}", model=start)
    asked = {**architecture, "workload": "classification", "folder": str(folder), "batch_size": 128,
             "epochs": 10, "trainable": trainable, "augmentation": "none", "seed": bench.seed, "evaluate": True,
             "weights": str(start / "model.safetensors")}  # fmt: skip
    other = naive(asked)
    # Decoding and training on both sides; the test is on neither.
    return Pair(fast["seconds_to_trained"], other["seconds"], (fast["accuracy"], other["accuracy"]))


def _frozen_spec(bench: Bench, trainable: str, epochs: int) -> Numbers:
    return fine_tune(
        bench, MODEL, trainable=trainable, augmentation="none", epochs=epochs, batch_size=128, **SGD
    )  # fmt: skip


@workload("head_resnet18_64_10_epochs", "s", 25, "time")
def head_only(bench: Bench) -> Pair:
    """Head only, 64 px, 10 epochs, decoding included: the frozen network runs once, not every epoch."""
    return _frozen(bench, "head", 5000)


@workload("last1_resnet18_64_10_epochs", "s", 4, "time")
def last_stage(bench: Bench) -> Pair:
    """`last:1`, 64 px, 10 epochs, decoding included."""
    return _frozen(bench, "last:1", 1500)


@workload("head_20_epochs_over_forward", "s", 1.25, "cost")
def head_over_forward(bench: Bench) -> Pair:
    """20 epochs of the head, from the plan to the saved model, against one forward pass in the plan's precision."""
    folder, start = bench.part(10_000), trunk(bench, {"architecture": "resnet18", "image_size": 64}, **SGD)
    cache = bench.work / f"cache-forward-{bench.seed}"
    spec = _frozen_spec(bench, "head", epochs=20)
    fast = ours(spec, bench, folder, cache=cache, model=start)
    one = run("ceiling", {**ceiling.asked(spec, bench, folder, start), "what": "forward", "cache": str(cache)})[-1]
    return Pair(fast["seconds_from_plan"], one["seconds"])


def _simclr(bench: Bench, architecture: Numbers, seconds: float) -> Pair:
    folder = bench.part(10_000)
    training = {**SGD, "epochs": 1000, "batch_size": 128, "learning_rate": 0.06, "max_seconds": seconds,
                "seed": bench.seed, "checkpoint_every": NEVER}  # fmt: skip
    spec = {"recipe": "simclr", "model": architecture, "training": training}
    fast = ours(spec, bench, folder)
    asked = {**architecture, "workload": "simclr", "folder": str(folder), "batch_size": 128,
             "seconds": seconds, "seed": bench.seed}  # fmt: skip
    return Pair(fast["samples_per_second"], naive(asked)["samples_per_second"])


@workload("simclr_small_cnn_32", "samples/s", 4, as_good_as="quality_simclr_small_cnn_32")
def simclr_small(bench: Bench) -> Pair:
    """SimCLR against lightly's transform, head and loss in plain PyTorch."""
    return _simclr(bench, {"architecture": "small_cnn", "image_size": 32}, 20)


@workload("simclr_resnet18_small_stem_32", "samples/s", 2.1, as_good_as="quality_simclr_resnet18_small_stem_32")
def simclr_resnet(bench: Bench) -> Pair:
    """The same with ResNet-18 and the small stem."""
    return _simclr(bench, {"architecture": "resnet18", "image_size": 32, "stem": "small"}, 30)


@workload("vae_mlp_128", "samples/s", 3, quality="loss")
def vae(bench: Bench) -> Pair:
    """VAE 784-400-20, batch 128, against the loop of PyTorch's example; quality: nats after 10 epochs."""
    folder = pictures.grey(bench, min(bench.samples(), 20_000), size=28)
    spec = {
        "recipe": "vae", "model": {"architecture": "mlp", "hidden": [400], "image_size": 28},
        "training": {"epochs": 10, "batch_size": 128, "learning_rate": 1e-3, "seed": bench.seed,
                     "optimizer": {"name": "adam"}, "weight_decay": 0.0, "schedule": "constant", "warmup_fraction": 0.0,
                     "checkpoint_every": NEVER},
    }  # fmt: skip
    fast = ours(spec, bench, folder)
    other = naive({"workload": "vae", "folder": str(folder), "image_size": 28, "batch_size": 128, "epochs": 10,
                   "seed": bench.seed})  # fmt: skip
    losses = (fast["last_epoch_loss"], other["loss"])
    return Pair(fast["samples_per_second"], other["samples_per_second"], losses, more={"workers": other["workers"]})
