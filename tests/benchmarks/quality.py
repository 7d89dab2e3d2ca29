"""Is it as good? Small pairs over seeds: accuracy of fine-tunes, k-NN accuracy after the same number of images.

`python -m tests.benchmarks.quality '{…}'` looks at one backbone: the same code for both sides.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.pairs import Bench, Numbers, Pair, workload
from tests.benchmarks.sides import MODEL, naive, ours, run, trunk
from tests.benchmarks.specs import NEVER, SGD, fine_tune


def _fine_tuned(
    bench: Bench, architecture: Numbers, pictures: int, test: int, epochs: int, batch: int,
    start: Path | None = None, learning_rate: float = SGD["learning_rate"],
) -> Pair:  # fmt: skip
    folder = bench.part(pictures, test)
    training = {**SGD, "learning_rate": learning_rate, "epochs": epochs, "batch_size": batch}
    mine = ours(fine_tune(bench, MODEL if start else architecture, **training), bench, folder, model=start)["accuracy"]
    asked = {**architecture, "workload": "classification", "folder": str(folder), "batch_size": batch,
             "epochs": epochs, "learning_rate": learning_rate, "seed": bench.seed, "evaluate": True}  # fmt: skip
    theirs = naive({**asked, "weights": str(start / "model.safetensors")} if start else asked)["accuracy"]
    return Pair(mine, theirs, (mine, theirs))


@workload("quality_finetune_resnet18_32", "accuracy", 0.5, "quality")
def finetune(bench: Bench) -> Pair:
    """Test accuracy of the full fine-tune after equal epochs: 2,500 pictures, 6 epochs, sgd, cosine."""
    return _fine_tuned(bench, {"architecture": "resnet18", "image_size": 32}, 2500, 5000, 6, 128)


@workload("quality_finetune_resnet18_small_stem_32", "accuracy", 0.5, "quality")
def finetune_small_stem(bench: Bench) -> Pair:
    """Test accuracy of the full fine-tune with the small stem after equal epochs: 2,000 pictures, 6 epochs."""
    return _fine_tuned(bench, {"architecture": "resnet18", "image_size": 32, "stem": "small"}, 2000, 2000, 6, 64)


@workload("quality_finetune_resnet50_64", "accuracy", 0.5, "quality")
def finetune_resnet50(bench: Bench) -> Pair:
    """Test accuracy of a full fine-tune of a trained ResNet-50 after equal epochs: 64 px, 2,000 pictures, 3 epochs."""
    architecture = {"architecture": "resnet50", "image_size": 64}
    start = trunk(bench, architecture, learning_rate=1e-3, optimizer={"name": "adamw"}, batch_size=64)
    return _fine_tuned(bench, architecture, 2000, 2000, 3, 64, start, learning_rate=0.003)


@workload("quality_simclr_small_cnn_32", "k-NN accuracy", 0.5, "quality")
def simclr(bench: Bench) -> Pair:
    """k-NN test accuracy after SimCLR on the same number of images: width 0.5, 4,000 pictures, 6 epochs."""
    return _contrasted(bench, {"architecture": "small_cnn", "image_size": 32, "width": 0.5}, 4000, 5000, 6)


@workload("quality_simclr_resnet18_small_stem_32", "k-NN accuracy", 0.5, "quality")
def simclr_resnet(bench: Bench) -> Pair:
    """k-NN test accuracy after SimCLR of ResNet-18 with the small stem: 1,500 pictures, 4 epochs."""
    return _contrasted(bench, {"architecture": "resnet18", "image_size": 32, "stem": "small"}, 1500, 2000, 4)


def _contrasted(bench: Bench, architecture: Numbers, pictures: int, test: int, epochs: int) -> Pair:
    folder, kept = bench.part(pictures, test), bench.work / f"simclr-{architecture['architecture']}-{bench.seed}"
    spec = {
        "recipe": "simclr", "model": architecture, "params": {"crop_min_scale": 0.08, "colour_strength": 0.5},
        "training": {**SGD, "epochs": epochs, "batch_size": 128, "learning_rate": 0.06, "schedule": "constant",
                     "warmup_fraction": 0.0, "seed": bench.seed, "checkpoint_every": NEVER},
    }  # fmt: skip
    ours(spec, bench, folder, keep=kept)
    naive({**architecture, "workload": "simclr", "folder": str(folder), "batch_size": 128, "epochs": epochs,
           "seed": bench.seed, "keep": str(kept / "other.pt")})  # fmt: skip
    common = {"folder": str(folder), "image_size": 32}
    mine = run("quality", {**common, "exported": str(kept)})[-1]["knn"]
    theirs = run("quality", {**common, "pickled": str(kept / "other.pt")})[-1]["knn"]
    return Pair(mine, theirs, (mine, theirs))


def _backbone(asked: Numbers) -> tuple[Any, Any, Any]:
    """Give a backbone with the normalisation that it was trained with."""
    import torch
    from lightly.transforms.utils import IMAGENET_NORMALIZE  # pyright: ignore
    from safetensors.torch import load_file

    from app.domain.models import ModelConfig
    from worker.parts import backbones

    if "pickled" in asked:
        network = torch.load(asked["pickled"], weights_only=False)  # our own file, written a moment ago
        return network, IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"]
    folder = Path(asked["exported"])
    config = ModelConfig.model_validate_json((folder / "config.json").read_text())
    network = backbones.build_backbone(
        config.architecture, channels=config.channels, image_size=config.image_size, seed=0
    )
    backbones.load_backbone(network, load_file(folder / "model.safetensors"), source=str(folder))
    return network, config.mean, config.std


def _measure(asked: Numbers) -> Numbers:
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    network, mean, std = _backbone(asked)
    size = asked["image_size"]
    plain = transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = ImageFolder(Path(asked["folder"]) / split, plain)
        pairs = [(network(x.to(device)).flatten(1).cpu(), y) for x, y in DataLoader(data, 250, num_workers=2)]
        return F.normalize(torch.cat([f for f, _ in pairs]), dim=1), torch.cat([y for _, y in pairs])

    with torch.inference_mode():
        (bank, labels), (queries, truth) = features("train"), features("test")
        near = (queries @ bank.T).topk(20, dim=1).indices
        return {"knn": float((labels[near].mode(1).values == truth).float().mean())}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
