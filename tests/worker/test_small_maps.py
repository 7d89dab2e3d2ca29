"""Convolutions over small maps as matrix products: the same sums as torch's own."""

import copy
import io
from typing import cast

import pytest
import torch
import torchvision
from torch import nn

from worker.parts.small_maps import SmallMapConv2d, keep_matrices, take_products

pytestmark = pytest.mark.worker

SHAPES = [  # kernel, stride, padding, map
    (3, 1, 1, (1, 1)), (3, 2, 1, (2, 2)), (3, 1, 1, (2, 2)), (3, 1, 1, (1, 2)), (3, 2, 1, (1, 1)), (5, 1, 2, (3, 3)),
    (7, 2, 3, (4, 4)), (7, 1, 3, (4, 3)), (3, 1, 2, (2, 1)),
]  # fmt: skip


def pair(kernel: int, stride: int, padding: int, *, bias: bool = True) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(kernel + stride)
    own = nn.Conv2d(6, 5, kernel, stride, padding, bias=bias).double()
    ours = copy.deepcopy(own)
    take_products(ours)
    assert type(ours) is SmallMapConv2d
    return own, ours


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_torch(
    kernel: int, stride: int, padding: int, size: tuple[int, int], layout: torch.memory_format
) -> None:
    own, ours = pair(kernel, stride, padding)
    images = torch.randn(3, 6, *size, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
    expected, found = own(images), ours(images)
    torch.testing.assert_close(found, expected)
    pull = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [images, *ours.parameters()], pull),
        torch.autograd.grad(expected, [images, *own.parameters()], pull),
    )


def test_gradients_of_gradients_are_right() -> None:
    own, ours = pair(3, 1, 1)
    images = torch.randn(2, 6, 2, 2, dtype=torch.double, requires_grad=True)
    for layer in (own, ours):
        (slope,) = torch.autograd.grad(layer(images).tanh().sum(), images, create_graph=True)
        slope.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, own.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_that_keeps_its_matrices_gives_the_same_bits_for_maps_of_every_size(dtype: torch.dtype) -> None:
    _, ours = pair(3, 1, 1)
    ours = cast(SmallMapConv2d, ours.to(dtype))
    keeps = copy.deepcopy(ours)
    keep_matrices(keeps)
    with torch.inference_mode():
        for size in ((1, 1), (2, 2), (2, 2), (8, 8), (1, 2)):
            images = torch.randn(3, 6, *size, dtype=dtype)
            assert torch.equal(keeps(images), ours(images))
    assert keeps.matrices is not None
    assert sorted(key[:2] for key in keeps.matrices) == [(1, 1), (1, 2), (2, 2)]
    assert ours.matrices is None


def test_large_maps_go_the_usual_way_to_the_bit() -> None:
    own, ours = pair(3, 1, 1)
    images = torch.randn(2, 6, 8, 8, dtype=torch.double)
    assert torch.equal(own(images), ours(images))


def test_what_it_cannot_do_is_left_alone() -> None:
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), nn.Conv2d(4, 4, 3, padding="same"),
    )  # fmt: skip
    take_products(layers)
    assert {type(layer) for layer in layers} == {nn.Conv2d}


def test_a_whole_network_trains_alike() -> None:
    torch.manual_seed(0)
    own = torchvision.models.resnet18(num_classes=4)
    ours = copy.deepcopy(own)
    take_products(ours)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for network in (own, ours):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    for (name, expected), found in zip(own.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=name)


def test_copies_and_saved_weights_stay_what_they_were() -> None:
    _, ours = pair(3, 1, 1)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        ours.weight.zero_()
    images = torch.randn(1, 6, 1, 1, dtype=torch.double)
    assert copied(images).abs().sum() > ours(images).abs().sum()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    assert set(ours.state_dict()) == {"weight", "bias"}
