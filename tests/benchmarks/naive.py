"""The naive way, as the field's tutorials write it: ImageFolder, DataLoader with 2 workers, per-picture transforms.

Run in a process of its own: `python -m tests.benchmarks.naive '{"workload": "classification", …}'` prints one line of
JSON: `{"samples_per_second", "seconds", "accuracy"}`. Nothing of ours is imported.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Clock:
    """Counts samples after a warm-up, until a time budget is spent."""

    def __init__(self, warmup: int, seconds: float) -> None:
        self.left, self.seconds, self.samples, self.begun = warmup, seconds, 0, 0.0

    def over(self, samples: int) -> bool:
        """Count one step; say whether the budget is spent."""
        if self.left > 0:
            self.left -= 1
            self.begun = time.perf_counter()
            return False
        self.samples += samples
        return time.perf_counter() - self.begun >= self.seconds

    @property
    def rate(self) -> float:
        """Samples per second since the warm-up."""
        return self.samples / (time.perf_counter() - self.begun)


def network(asked: dict[str, Any]) -> Any:
    """Build a torchvision network; `stem: small` is the usual 3x3 stem for 32 pixels."""
    model = getattr(torchvision.models, asked["architecture"])(num_classes=asked.get("classes", 10))
    if asked.get("stem") == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model


def training_transform(asked: dict[str, Any]) -> transforms.Compose:
    """The usual augmentation: random crop with padding and flip for small pictures, resized crop for large ones."""
    size = asked["image_size"]
    augment: list[Any] = [transforms.Resize((size, size))]
    if asked.get("augmentation", "standard") == "standard":
        if size <= 64:
            augment += [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
        else:
            augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def classification(asked: dict[str, Any]) -> dict[str, float | None]:
    """Fine-tune as torchvision's references do, in float32, for a number of epochs or seconds."""
    torch.manual_seed(asked.get("seed", 0))
    data = ImageFolder(Path(asked["folder"]) / "train", training_transform(asked))
    loader = DataLoader(data, asked["batch_size"], shuffle=True, num_workers=2, drop_last=True)
    model = network(asked)
    trainable = asked.get("trainable", "all")
    if trainable != "all":
        for parameter in model.parameters():
            parameter.requires_grad = False
        parts = [model.fc] if trainable == "head" else [model.layer4, model.fc]
        for part in parts:
            for parameter in part.parameters():
                parameter.requires_grad = True
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=asked.get("learning_rate", 0.05), momentum=0.9, weight_decay=5e-4)
    clock = Clock(asked.get("warmup", 3), asked.get("seconds", 1e9))
    begun = time.perf_counter()
    epochs = asked.get("epochs", 1_000_000)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1)) if epochs < 1_000_000 else None
    for _epoch in range(epochs):
        model.train()
        done = False
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            float(loss.item())  # tutorials print it
            if done := clock.over(len(images)):
                break
        if done:
            break
        if schedule:
            schedule.step()
    seconds = time.perf_counter() - begun
    accuracy = evaluate(model, asked) if asked.get("evaluate") else None
    return {"samples_per_second": clock.rate, "seconds": seconds, "accuracy": accuracy}


@torch.no_grad()
def evaluate(model: nn.Module, asked: dict[str, Any]) -> float:
    """Accuracy on the test folder."""
    size = asked["image_size"]
    steps = [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = ImageFolder(Path(asked["folder"]) / "test", transforms.Compose(steps))
    model.eval()
    right = 0
    for images, labels in DataLoader(data, 256, num_workers=2):
        right += int((model(images).argmax(1) == labels).sum())
    return right / len(data)


def simclr(asked: dict[str, Any]) -> dict[str, float | None]:
    """SimCLR as lightly's plain-PyTorch example writes it, with lightly's own transform and loss."""
    from lightly.loss import NTXentLoss  # pyright: ignore
    from lightly.transforms import SimCLRTransform  # pyright: ignore

    torch.manual_seed(asked.get("seed", 0))
    size = asked["image_size"]
    data = ImageFolder(Path(asked["folder"]) / "train", SimCLRTransform(input_size=size, gaussian_blur=0.0))
    loader = DataLoader(data, asked["batch_size"], shuffle=True, num_workers=2, drop_last=True)
    if asked["architecture"] == "small_cnn":
        backbone: Any = small_vgg()
        dimension = 256
    else:
        backbone = network(asked)
        dimension = backbone.fc.in_features
        backbone.fc = nn.Identity()
    head = nn.Sequential(nn.Linear(dimension, dimension), nn.ReLU(), nn.Linear(dimension, 128))
    loss_of = NTXentLoss(temperature=0.5)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.06, momentum=0.9, weight_decay=5e-4)
    clock = Clock(asked.get("warmup", 3), asked.get("seconds", 1e9))
    begun = time.perf_counter()
    for (x0, x1), _labels, *_ in _forever(loader, asked.get("epochs")):
        z0, z1 = head(backbone(x0).flatten(1)), head(backbone(x1).flatten(1))
        loss = loss_of(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        if clock.over(len(x0)):
            break
    seconds = time.perf_counter() - begun
    accuracy = knn(backbone, asked) if asked.get("evaluate") else None
    return {"samples_per_second": clock.rate, "seconds": seconds, "accuracy": accuracy}


def small_vgg() -> nn.Module:
    """The VGG-like network of the speed records: 2 million parameters, blocks of 64, 256 and 256 channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.GELU()]
    before = 24
    for width in (64, 256, 256):
        layers += [nn.Conv2d(before, width, 3, padding="same"), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
        layers += [nn.Conv2d(width, width, 3, padding="same"), nn.BatchNorm2d(width), nn.GELU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())


def _forever(loader: DataLoader[Any], epochs: int | None) -> Iterator[Any]:
    epoch = 0
    while epochs is None or epoch < epochs:
        yield from loader
        epoch += 1


@torch.no_grad()
def knn(backbone: nn.Module, asked: dict[str, Any], k: int = 20) -> float:
    """k-NN accuracy of the features, cosine similarity, on (a part of) train and test."""
    size = asked["image_size"]
    plain = transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    backbone.eval()

    def features(split: str) -> tuple[Tensor, Tensor]:
        data = ImageFolder(Path(asked["folder"]) / split, plain)
        pairs = [(backbone(x).flatten(1), y) for x, y in DataLoader(data, 256, num_workers=2)]
        return F.normalize(torch.cat([f for f, _ in pairs]), dim=1), torch.cat([y for _, y in pairs])

    bank, labels = features("train")
    queries, truth = features("test")
    near = (queries @ bank.T).topk(k, dim=1).indices
    return float((labels[near].mode(1).values == truth).float().mean())


def vae(asked: dict[str, Any]) -> dict[str, float | None]:
    """The loop of PyTorch's own VAE example: 784-400-20, Adam, batch 128, pixels flattened in grey."""
    torch.manual_seed(asked.get("seed", 0))
    size = asked["image_size"]
    steps = [transforms.Grayscale(), transforms.Resize((size, size)), transforms.ToTensor()]
    data = ImageFolder(Path(asked["folder"]) / "train", transforms.Compose(steps))
    loader = DataLoader(data, asked["batch_size"], shuffle=True, num_workers=2)
    pixels = size * size
    first, mean, spread = nn.Linear(pixels, 400), nn.Linear(400, 20), nn.Linear(400, 20)
    third, fourth = nn.Linear(20, 400), nn.Linear(400, pixels)
    optimizer = torch.optim.Adam([p for m in (first, mean, spread, third, fourth) for p in m.parameters()], lr=1e-3)
    clock = Clock(asked.get("warmup", 3), asked.get("seconds", 1e9))
    begun = time.perf_counter()
    for images, _ in _forever(loader, asked.get("epochs")):
        x = images.view(-1, pixels)
        hidden = F.relu(first(x))
        mu, logvar = mean(hidden), spread(hidden)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        again = torch.sigmoid(fourth(F.relu(third(z))))
        loss = F.binary_cross_entropy(again, x, reduction="sum")
        loss = loss - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        optimizer.zero_grad()
        loss.backward()
        loss.item()
        optimizer.step()
        if clock.over(len(images)):
            break
    return {"samples_per_second": clock.rate, "seconds": time.perf_counter() - begun, "accuracy": None}


WORKLOADS = {"classification": classification, "simclr": simclr, "vae": vae}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(WORKLOADS[wanted.pop("workload")](wanted)))
