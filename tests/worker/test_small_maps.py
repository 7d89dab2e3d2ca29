"""Convolutions as matrix products: the same sums as torch's own."""

import copy
import io
from typing import cast

import pytest
import torch
import torchvision
from torch import nn

from worker.parts import small_maps
from worker.parts.small_maps import SmallMapConv2d, keep_matrices, take_products

pytestmark = pytest.mark.worker

SHAPES = [  # kernel, stride, padding, map
    (3, 1, 1, (1, 1)), (3, 2, 1, (2, 2)), (3, 1, 1, (2, 2)), (3, 1, 1, (1, 2)), (3, 2, 1, (1, 1)), (5, 1, 2, (3, 3)),
    (7, 2, 3, (4, 4)), (7, 1, 3, (4, 3)), (3, 1, 2, (2, 1)), ((1, 3), 1, (0, 1), (1, 1)), ((3, 1), 1, (1, 0), (1, 1)),
    ((5, 3), (2, 1), (2, 1), (3, 2)),
]  # fmt: skip
Pair = int | tuple[int, int]
STRIDED = [  # likewise
    (1, 2, 0, (2, 2)), (1, 2, 0, (7, 4)), (1, 3, 1, (5, 5)), (3, 2, 1, (4, 4)), (3, 2, 1, (7, 4)), (3, 2, 0, (5, 8)),
    (3, 3, 1, (8, 8)), (2, 2, 0, (6, 7)), (2, 4, 0, (5, 8)), (5, 2, 2, (7, 7)), ((3, 2), (2, 3), (1, 0), (7, 5)),
]  # fmt: skip


@pytest.fixture
def windows_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take windows for every strided convolution, in double precision too."""
    monkeypatch.setattr(small_maps, "_WINDOW_DTYPES", (torch.double,))
    monkeypatch.setattr(small_maps, "_WINDOW_CHANNELS", 1)


def test_forward_alone_the_convolution_runs_over_all_but_the_smallest_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = small_maps._windows
    monkeypatch.setattr(small_maps, "_windows", lambda *given: taken.append(given[0].shape[2]) or real(*given))
    ours = nn.Conv2d(128, 4, 3, 2, 1, dtype=torch.bfloat16)
    take_products(ours)
    with torch.inference_mode():
        for size in (4, 6):
            ours(torch.randn(2, 128, size, size, dtype=torch.bfloat16))
    assert taken == [4]


def pair(kernel: Pair, stride: Pair, padding: Pair, *, bias: bool = True) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    own = nn.Conv2d(6, 5, kernel, stride, padding, bias=bias).double()
    ours = copy.deepcopy(own)
    take_products(ours)
    assert type(ours) is SmallMapConv2d
    return own, ours


@pytest.mark.usefixtures("windows_everywhere")
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), [*SHAPES, *STRIDED])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_torch(
    kernel: Pair, stride: Pair, padding: Pair, size: tuple[int, int], layout: torch.memory_format
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


@pytest.mark.usefixtures("windows_everywhere")
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 2), (3, 2, 6), (1, 2, 4)])
def test_gradients_of_gradients_are_right(kernel: int, stride: int, size: int) -> None:
    own, ours = pair(kernel, stride, kernel // 2)
    images = torch.randn(2, 6, size, size, dtype=torch.double, requires_grad=True)
    for layer in (own, ours):
        (slope,) = torch.autograd.grad(layer(images).tanh().sum(), images, create_graph=True)
        slope.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, own.weight.grad)


@pytest.mark.usefixtures("windows_everywhere")
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 2), (1, 2, 4), (1, 2, 6), (3, 2, 6)])
def test_what_follows_may_change_the_map_in_place(kernel: int, stride: int, size: int) -> None:
    own, ours = pair(kernel, stride, kernel // 2, bias=False)
    images = torch.randn(2, 6, size, size, dtype=torch.double).to(memory_format=torch.channels_last)
    for layer in (own, ours):
        layer.to(memory_format=torch.channels_last)
        nn.functional.relu(layer(images), inplace=True).square().sum().backward()
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


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size", "dtype", "takes"),
    [
        (128, 3, 2, 8, torch.bfloat16, True), (128, 3, 2, 8, torch.float32, False),
        (128, 3, 2, 10, torch.bfloat16, False), (128, 3, 1, 4, torch.bfloat16, False),
        (64, 3, 2, 8, torch.bfloat16, False),
        (4, 1, 2, 32, torch.bfloat16, True), (4, 1, 2, 32, torch.float32, False),
    ],
)  # fmt: skip
def test_windows_are_taken_where_they_were_measured_to_be_faster(
    channels: int, kernel: int, stride: int, size: int, dtype: torch.dtype, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    real = small_maps._windows
    monkeypatch.setattr(small_maps, "_windows", lambda *given: taken.append(True) or real(*given))
    ours = nn.Conv2d(channels, 4, kernel, stride, kernel // 2)
    usual = copy.deepcopy(ours)
    take_products(ours)
    images = torch.randn(2, channels, size, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, expected = ours(images), usual(images)
    assert found.dtype == dtype
    torch.autograd.grad(found.float().sum(), ours.weight, retain_graph=True)
    assert bool(taken) == takes
    if not takes:
        assert torch.equal(found, expected)
        return
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    slopes = [torch.autograd.grad(output.float().square().mean(), layer.weight)[0] for output, layer in
              ((found, ours), (expected, usual))]  # fmt: skip
    assert slopes[0].dtype == torch.float32
    torch.testing.assert_close(slopes[0], slopes[1], atol=0.02 * float(slopes[1].abs().max()), rtol=0.02)


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
    own, ours = pair(3, 1, 1)
    images = torch.randn(1, 6, 1, 1, dtype=torch.double)
    copied, expected, file = copy.deepcopy(ours), ours(images), io.BytesIO()
    torch.save(ours.state_dict(), file)
    with torch.no_grad():
        ours.weight.zero_()
        own.weight.zero_()
    assert torch.equal(copied(images), expected)
    file.seek(0)
    own.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(own(images), expected)
