"""Activations computed twice: the same numbers, the same statistics, less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worker.parts.backbones import build_backbone
from worker.parts.recompute import recompute_stages
from worker.parts.seed import reseed

pytestmark = pytest.mark.worker

# Batch norm, dropout and stochastic depth, attention.
ARCHITECTURES: dict[str, tuple[dict[str, Any], int]] = {
    "small_cnn": ({"architecture": "small_cnn", "width": 0.125}, 16),
    "resnet18": ({"architecture": "resnet18", "weights": None, "stem": "small", "keep_stages": 3}, 16),
    "efficientnet_b0": ({"architecture": "efficientnet_b0", "weights": None, "keep_stages": 4}, 32),
    "small_vit": ({"architecture": "small_vit", "width": 48, "depth": 4}, 16),
}


def backward(name: str, *, again: bool) -> tuple[nn.Module, Tensor, int]:
    """Go forward twice and backward once; give the network, its features and the bytes kept between."""
    architecture, size = ARCHITECTURES[name]
    backbone = build_backbone(architecture, channels=3, image_size=size, seed=1).train()
    if again:
        recompute_stages(backbone)
    images = torch.rand(2, 6, 3, size, size, generator=torch.Generator().manual_seed(2))
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
        return tensor

    reseed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = torch.cat([backbone(images[0]), backbone(images[1])])
    (made * torch.arange(len(made))[:, None]).mean().backward()
    return backbone, made.detach(), kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_gives_what_the_network_gives_and_keeps_less(name: str) -> None:
    plain, features, kept = backward(name, again=False)
    again, same_features, kept_again = backward(name, again=True)
    torch.testing.assert_close(same_features, features)
    theirs = dict(again.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(theirs[key].grad, parameter.grad, msg=key)
    state = again.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), f"{key} was moved twice"
    assert kept_again < 0.7 * kept, (kept_again, kept)


def test_without_gradients_nothing_runs_twice() -> None:
    architecture, size = ARCHITECTURES["small_cnn"]
    plain = build_backbone(architecture, channels=3, image_size=size, seed=1).eval()
    images = torch.rand(4, 3, size, size)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    convolutions = [layer for layer in plain.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.register_forward_hook(count)
    with torch.no_grad():
        before = plain(images)
        once, passes = passes, 0
        recompute_stages(plain)
        assert torch.equal(plain(images), before)
    assert passes == once >= len(convolutions)
    passes = 0
    plain(images).sum().backward()
    assert passes > once, "or hooks would count nothing"
