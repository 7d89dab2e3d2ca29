"""The training script: one epoch over an image folder; it notes the time when its first optimiser step is done."""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tests.benchmarks.naive import DEVICE, small_vgg


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--stamps", required=True, type=Path)
    given = parser.parse_args()
    steps = [transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize(0.3, 0.37)]
    data = ImageFolder(given.folder / "train", transforms.Compose(steps))
    loader = DataLoader(data, 128, shuffle=True, num_workers=2, drop_last=True)
    model = nn.Sequential(small_vgg(1, 8), nn.Linear(256, 10)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, (images, labels) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
        loss.backward()
        optimizer.step()
        loss.item()
        if number == 0:
            half = given.stamps / f".{given.job}"
            half.write_text(str(time.time()))
            half.rename(given.stamps / given.job)
    (given.stamps / f"{given.job}.done").touch()


if __name__ == "__main__":
    main()
