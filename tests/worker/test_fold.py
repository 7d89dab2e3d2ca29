"""Batch norms that become part of the convolutions before them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from worker.parts import backbones
from worker.parts.fold import folded, is_plain

pytestmark = pytest.mark.worker


def settled(name: str, size: int = 32) -> nn.Module:
    """A backbone whose batch norms have statistics, scales and shifts worth folding."""
    backbone = backbones.build_backbone({"architecture": name, "weights": None}, channels=3, image_size=size, seed=0)
    draws = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=draws)
                module.running_var.uniform_(0.5, 2, generator=draws)
                module.weight.uniform_(0.5, 1.5, generator=draws)
                module.bias.normal_(0, 0.1, generator=draws)
    return backbone.eval()


def norms_that_run(network: nn.Module, images: Tensor) -> int:
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and "forward" not in vars(module):
            module.register_forward_hook(note)
    with torch.inference_mode():
        network(images)
    return count


@pytest.mark.parametrize("name", ["resnet18", "small_cnn", "mobilenet_v3_small", "regnet_y_400mf"])
def test_a_folded_network_gives_the_same_without_its_norms(name: str) -> None:
    network, images = settled(name), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    made = folded(network, images)
    assert made is not network
    with torch.inference_mode():
        torch.testing.assert_close(made(images), network(images), atol=1e-4, rtol=1e-3)
    # In small_cnn pooling stands between the first convolution of a block and its norm.
    assert norms_that_run(made, images) == (3 if name == "small_cnn" else 0)


def test_stages_are_folded_as_the_backbone_is() -> None:
    network, images = settled("resnet18"), torch.randn(2, 3, 32, 32)
    prefix = nn.Sequential(*backbones.stage_modules(network)[:3])
    made = folded(prefix, images)
    assert made is not prefix
    assert norms_that_run(made, images) == 0
    with torch.inference_mode():
        torch.testing.assert_close(made(images), prefix(images), atol=1e-4, rtol=1e-3)


def test_the_network_itself_stays_as_it_was() -> None:
    network, images = settled("resnet18"), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(network.state_dict())
    folded(network, images)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert norms_that_run(network, images) == 20


def test_a_network_without_batch_norm_is_given_back() -> None:
    network = settled("mlp")
    assert folded(network, torch.randn(2, 3, 32, 32)) is network


def test_both_are_compared_without_rounding_to_tf32() -> None:
    network, seen = settled("resnet18"), list[tuple[str, bool]]()

    def look(*_: object) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    network.register_forward_pre_hook(look)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        folded(network, torch.randn(2, 3, 32, 32))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[-2:] == [("highest", False)] * 2


class Twice(nn.Module):
    """Uses the map before its norm a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.weight, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return self.norm(x) + x


def test_a_map_that_is_used_twice_is_left_alone() -> None:
    network = Twice().eval()
    assert folded(network, torch.randn(2, 3, 8, 8)) is network


@pytest.mark.parametrize(("name", "plain"), [("resnet18", True), ("mobilenet_v3_small", True), ("vit_b_16", False)])
def test_only_a_network_that_autocast_computes_low_throughout_may_be_converted(name: str, plain: bool) -> None:
    network = settled(name)
    made = folded(network, torch.randn(2, 3, 32, 32))
    assert is_plain(made) is plain
    if plain:
        assert not is_plain(network), "its batch norms still run in float32"
