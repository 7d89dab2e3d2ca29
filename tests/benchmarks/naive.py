"""The naive way, as the field's tutorials write it: ImageFolder, DataLoader with 2 workers, per-picture transforms.

Run in a process of its own: `python -m tests.benchmarks.naive '{"workload": "classification", …}'` prints one line of
JSON: `{"samples_per_second", "seconds", "accuracy", …}`. Nothing of ours is imported.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Asked = dict[str, Any]


class Clock:
    """Counts samples after a warm-up, until a time budget is spent."""

    def __init__(self, warmup: int, seconds: float) -> None:
        self.left, self.seconds, self.samples, self.begun, self.ended = warmup, seconds, 0, 0.0, 0.0

    def over(self, samples: int) -> bool:
        """Count one step; say whether the budget is spent."""
        if self.left > 0:
            self.left -= 1
            self.begun = time.perf_counter()
            return False
        self.samples += samples
        self.ended = time.perf_counter()
        return self.ended - self.begun >= self.seconds

    @property
    def rate(self) -> float:
        """Samples per second from the warm-up to the last step; what ends the workers after it is not in it."""
        return self.samples / (self.ended - self.begun)


def network(asked: Asked) -> Any:
    """Build a torchvision network; `stem: small` is the usual one for 32 pixels, `weights` a file to start from."""
    model = getattr(torchvision.models, asked["architecture"])(num_classes=asked.get("classes", 10))
    if asked.get("stem") == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    if asked.get("weights"):
        from safetensors.torch import load_file

        kept = {name: value for name, value in load_file(asked["weights"]).items() if not name.startswith("fc.")}
        model.load_state_dict(kept, strict=False)
    return model


def training_transform(asked: Asked) -> transforms.Compose:
    """The usual augmentation: random crop with padding and flip for small pictures, resized crop for large ones."""
    size = asked["image_size"]
    augment: list[Any] = [transforms.Resize((size, size))]
    if asked.get("augmentation", "standard") == "standard":
        if size <= 64:
            augment += [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip()]
        else:
            augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def classification(asked: Asked) -> dict[str, Any]:
    """Fine-tune as torchvision's references do, in float32, for a number of epochs or seconds, or to an accuracy.

    Its seconds end with training, except in a race to an accuracy, which is not over before that was looked at.
    """
    torch.manual_seed(asked.get("seed", 0))
    data = ImageFolder(Path(asked["folder"]) / "train", training_transform(asked))
    loader = DataLoader(data, asked["batch_size"], shuffle=True, num_workers=2, drop_last=True)
    model = network(asked).to(DEVICE)
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
    epochs, target = asked.get("epochs", 1_000_000), asked.get("target")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1)) if epochs < 1_000_000 else None
    accuracy = None
    for _epoch in range(epochs):
        model.train()
        done = False
        for images, labels in loader:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
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
        if target is not None and (accuracy := evaluate(model, asked)) >= target:
            break
    seconds = time.perf_counter() - begun
    if asked.get("evaluate") and (target is None or accuracy is None or accuracy < target):
        accuracy = evaluate(model, asked)
    if target is not None:
        seconds = time.perf_counter() - begun
    return {"samples_per_second": clock.rate, "seconds": seconds, "accuracy": accuracy}


@torch.no_grad()
def evaluate(model: nn.Module, asked: Asked) -> float:
    """Accuracy on the test folder."""
    size = asked["image_size"]
    steps = [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = ImageFolder(Path(asked["folder"]) / asked.get("test", "test"), transforms.Compose(steps))
    model.eval()
    right = 0
    for images, labels in DataLoader(data, 256, num_workers=2):
        right += int((model(images.to(DEVICE)).argmax(1).cpu() == labels).sum())
    return right / len(data)


def simclr(asked: Asked) -> dict[str, Any]:
    """SimCLR as lightly's plain-PyTorch example writes it, with lightly's transform (for CIFAR), head and loss."""
    from lightly.loss import NTXentLoss  # pyright: ignore
    from lightly.models.modules import SimCLRProjectionHead  # pyright: ignore
    from lightly.transforms import SimCLRTransform  # pyright: ignore

    torch.manual_seed(asked.get("seed", 0))
    transform = SimCLRTransform(input_size=asked["image_size"], cj_strength=0.5, gaussian_blur=0.0)
    data = ImageFolder(Path(asked["folder"]) / "train", transform)
    loader = DataLoader(data, asked["batch_size"], shuffle=True, num_workers=2, drop_last=True)
    if asked["architecture"] == "small_cnn":
        backbone: Any = small_vgg(width=asked.get("width", 1.0))
        dimension = [layer for layer in backbone if isinstance(layer, nn.Conv2d)][-1].out_channels
    else:
        backbone = network(asked)
        dimension = backbone.fc.in_features
        backbone.fc = nn.Identity()
    head = SimCLRProjectionHead(dimension, dimension, 128)
    backbone, head = backbone.to(DEVICE), head.to(DEVICE)
    loss_of = NTXentLoss(temperature=0.5)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.06, momentum=0.9, weight_decay=5e-4)
    clock = Clock(asked.get("warmup", 3), asked.get("seconds", 1e9))
    begun = time.perf_counter()
    for (x0, x1), _labels, *_ in _forever(loader, asked.get("epochs")):
        z0, z1 = head(backbone(x0.to(DEVICE)).flatten(1)), head(backbone(x1.to(DEVICE)).flatten(1))
        loss = loss_of(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        if clock.over(len(x0)):
            break
    seconds = time.perf_counter() - begun
    if asked.get("keep"):
        torch.save(backbone.cpu(), asked["keep"])
    return {"samples_per_second": clock.rate, "seconds": seconds, "accuracy": None}


def small_vgg(channels: int = 3, size: int = 32, width: float = 1.0) -> nn.Module:
    """The VGG-like network of the speed records: 2 million parameters, blocks of 64, 256 and 256 channels.

    A map of under 12 pixels is not pooled in the first block. The convolutions start near the identity.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, 24, 2), nn.GELU()]
    before, side = 24, size - 1
    for number, base in enumerate((64, 256, 256)):
        after = max(8, round(base * width / 8) * 8)
        layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
        if number or side >= 12:
            layers.append(nn.MaxPool2d(2, ceil_mode=side < 4))
            side = (side + 1) // 2 if side < 4 else side // 2
        layers += [nn.BatchNorm2d(after), nn.GELU()]
        layers += [nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
        before = after
    for layer in layers[2:]:
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                nn.init.dirac_(layer.weight[: layer.in_channels])
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())


def _forever(loader: DataLoader[Any], epochs: int | None) -> Iterator[Any]:
    epoch = 0
    while epochs is None or epoch < epochs:
        yield from loader
        epoch += 1


class Vae(nn.Module):
    """784-400-20, as PyTorch's own example has it."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.first, self.mean, self.spread = nn.Linear(pixels, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.third, self.fourth = nn.Linear(20, 400), nn.Linear(400, pixels)

    def forward(self, x: Tensor) -> Tensor:
        """Give the summed loss of a batch [batch, pixels]."""
        hidden = F.relu(self.first(x))
        mu, logvar = self.mean(hidden), self.spread(hidden)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        again = torch.sigmoid(self.fourth(F.relu(self.third(z))))
        loss = F.binary_cross_entropy(again, x, reduction="sum")
        return loss - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


class Grey(Dataset[tuple[Tensor, int]]):
    """Grey pictures in memory, given one by one as torchvision's MNIST gives its own: a PIL image into a transform."""

    def __init__(self, folder: Path, size: int) -> None:
        shrink = transforms.Compose([transforms.Grayscale(), transforms.Resize((size, size)), transforms.PILToTensor()])
        self.pixels = torch.cat([image for image, _ in ImageFolder(folder, shrink)])
        self.transform = transforms.ToTensor()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[row].numpy())), 0


def vae(asked: Asked) -> dict[str, Any]:
    """The loop of PyTorch's own VAE example: 784-400-20, Adam, batch 128; with as many workers as suit it best."""
    torch.manual_seed(asked.get("seed", 0))
    size = asked["image_size"]
    data = Grey(Path(asked["folder"]) / "train", size)
    # Two epochs, whole: every epoch starts its workers anew.
    tried = [_vae_epochs(data, size, workers, asked["batch_size"], epochs=2) for workers in (0, 1, 2)]
    best = min(tried, key=lambda found: found["seconds"])["workers"]
    return _vae_epochs(data, size, best, asked["batch_size"], epochs=asked["epochs"])


def _vae_epochs(data: Grey, size: int, workers: int, batch_size: int, epochs: int) -> dict[str, Any]:
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    model = Vae(size * size).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    clock, total = Clock(3, 1e9), 0.0
    begun = time.perf_counter()
    for _epoch in range(epochs):
        total = 0.0
        for images, _ in loader:
            loss = model(images.to(DEVICE).view(-1, size * size))
            optimizer.zero_grad()
            loss.backward()
            total += loss.item()
            optimizer.step()
            clock.over(len(images))
    loss = total / (len(loader) * batch_size)
    seconds = time.perf_counter() - begun
    return {"samples_per_second": clock.rate, "seconds": seconds, "loss": loss, "workers": workers}


WORKLOADS = {"classification": classification, "simclr": simclr, "vae": vae}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(WORKLOADS[wanted.pop("workload")](wanted)))
