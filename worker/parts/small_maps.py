"""Convolutions that are faster as one matrix product: over maps smaller than their kernel, and some with a stride.

A ResNet-18 on 32-pixel images ends in maps of 2x2 and 1x1: there a 3x3 kernel mostly multiplies padding (eight of its
nine taps on a 1x1 map), and the filters are the largest of the network. Written as a product of the flattened map with
the taps that do meet it, the same sum costs 4/9 or 1/9 of the multiplications, and only those taps are cast to
bfloat16. Measured on a 2-core AVX512-bf16 machine, forward and backward, 128 x 512 channels at 1x1: 14.9 ms as a
convolution, 2.6 ms as a product.

In bfloat16, convolutions with a stride go backward at a fifth of what the processor can do. As a product with the
windows of the map, a batch of 128 from 256 to 512 channels, from 4x4 to 2x2, takes 5.6 ms in place of 15.3 (3x3), or
0.7 in place of 2.1 (1x1), forward and backward. In float32, or without a stride, or over large maps, the convolution is
the faster one; forward alone it is so over more than 2x2 places.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where the windows of a strided convolution are faster backward: in these dtypes, if it only picks places (1x1), or has
# at least so many channels and at most so many new places; forward over fewer places. Batches of 32, 128 and 256.
_WINDOW_DTYPES, _WINDOW_CHANNELS, _WINDOW_PLACES, _FORWARD_PLACES = (torch.bfloat16,), 128, 16, 4


class SmallMapConv2d(nn.Conv2d):
    """An `nn.Conv2d` that takes a product where that is faster, and is an `nn.Conv2d` otherwise."""

    matrices: "dict[tuple[int, int, torch.dtype], _Matrix] | None" = None  # see keep_matrices

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        if 2 * input.shape[2] * input.shape[3] <= self.kernel_size[0] * self.kernel_size[1]:
            made = self._product(input.to(dtype))
        elif dtype in _WINDOW_DTYPES and self._picks_few(input):
            made = _Windows.apply(input.to(dtype), self.weight, self.stride, self.padding)  # type: ignore[no-untyped-call]
            if made.dim() == 2:
                made = _map(made.view(len(input), -1), self.out_channels, self._places(input))
        else:
            return super().forward(input)
        return made if self.bias is None else made + self.bias.to(dtype)[:, None, None]

    def _product(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        if self.matrices is None:
            flat = _Product.apply(x, self.weight, self.stride, self.padding)  # type: ignore[no-untyped-call]
            return _map(flat, self.out_channels, self._places(x))
        height, width = x.shape[2:]
        if (height, width, x.dtype) not in self.matrices:
            self.matrices[height, width, x.dtype] = _matrix(x, self.weight, self.stride, self.padding)
        matrix = self.matrices[height, width, x.dtype]
        return _map(_flat(x) @ matrix.dense.T, self.out_channels, matrix.places)

    def _picks_few(self, input: Tensor) -> bool:
        rows, columns = self._places(input)
        few = self.in_channels >= _WINDOW_CHANNELS and rows * columns <= _WINDOW_PLACES
        back = torch.is_grad_enabled() or rows * columns <= _FORWARD_PLACES
        return max(self.stride) > 1 and back and (self.kernel_size == (1, 1) or few)

    def _places(self, input: Tensor) -> tuple[int, int]:
        assert not isinstance(self.padding, str)
        return _places(input.shape[2:], self.kernel_size, self.stride, self.padding)


def take_products(module: nn.Module) -> None:
    """Let every convolution below `module` that can do so take products where they are faster.

    The class is exchanged in place: names, weights and copies of the module stay what they are.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _suits(layer):
            layer.__class__ = SmallMapConv2d


def keep_matrices(module: nn.Module) -> None:
    """Let convolutions lay their filters out once, not in every pass: for a copy that nobody trains.

    Laying them out took 0.26 of 2.3 s of a frozen ResNet-18 over 5,000 images of 64 pixels, on two cores.
    """
    for layer in module.modules():
        if isinstance(layer, SmallMapConv2d):
            layer.matrices = {}


def _suits(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str) and (max(layer.kernel_size) > 1 or max(layer.stride) > 1)
    )  # fmt: skip


class _Product(torch.autograd.Function):
    """[batch, in, height, width] and [out, in, rows, columns] -> [batch, new places * out].

    A map is made of it outside: what a function gives as a view, torch does not let an activation change in place.
    The backward pass is written in differentiable operations of the saved arguments, so that gradients of gradients
    (R1 penalties) are right too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        matrix = _matrix(x, weight, stride, padding)
        ctx.save_for_backward(x, weight)
        ctx.taps, ctx.places, ctx.dense = matrix.taps, matrix.places, matrix.dense
        return _flat(x) @ matrix.dense.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            # Laid out again only where its own gradient is wanted.
            dense = _dense(weight, ctx.taps, ctx.places, x) if torch.is_grad_enabled() else ctx.dense
            for_x = _map(gradient @ dense, weight.shape[1], x.shape[2:])
        if ctx.needs_input_grad[1]:
            for_weight = _sparse(gradient.T @ _flat(x), weight, ctx.taps)
        return for_x, for_weight, None, None


class _Windows(torch.autograd.Function):
    """The windows of the map times the filters as they lie in memory: [batch * new places, out].

    Where the convolution is faster forward, what it gives: [batch, out, new height, new width].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        if math.prod(_places(x.shape[2:], weight.shape[2:], stride, padding)) <= _FORWARD_PLACES:
            return _windows(x, weight, stride, padding) @ _filters(weight, x).T
        return F.conv2d(x, weight.to(x.dtype), None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        if gradient.dim() == 4:
            gradient = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = _unwound(gradient @ _filters(weight, x), x, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            matrix = gradient.T @ _windows(x, weight, ctx.stride, ctx.padding)  # [out, taps * in]
            by_tap = matrix.to(weight.dtype).view(len(weight), *weight.shape[2:], -1)
            for_weight = by_tap.permute(0, 3, 1, 2)
        return for_x, for_weight, None, None


def _places(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """Give the size of the new map."""
    rows, columns = ((size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))
    return rows, columns


def _filters(weight: Tensor, x: Tensor) -> Tensor:
    """[out, in, rows, columns] -> [out, taps * in] in the dtype of `x`."""
    return weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)


def _windows(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """[batch, in, height, width] -> [batch * new places, taps * in]."""
    (rows, columns), (down, across), (above, left) = weight.shape[2:], stride, padding
    padded = x.permute(0, 2, 3, 1)
    if above or left:
        padded = F.pad(padded, (0, 0, left, left, above, above))
    windows = padded.unfold(1, rows, down).unfold(2, columns, across)  # [batch, *new places, in, rows, columns]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, rows * columns * x.shape[1])


def _unwound(flat: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Sum what lies in windows, [batch * new places, taps * in], over the places of `x` that they show."""
    (rows, columns), (down, across), (above, left) = weight.shape[2:], stride, padding
    batch, into, height, width = x.shape
    high, wide = _places(x.shape[2:], weight.shape[2:], stride, padding)
    by_tap = flat.view(batch, high, wide, rows, columns, into)
    padded = flat.new_zeros(batch, height + 2 * above, width + 2 * left, into)
    for row in range(rows):
        for column in range(columns):
            # Not `+=`, which would copy the sum onto itself once more.
            padded[:, row : row + down * high : down, column : column + across * wide : across].add_(
                by_tap[:, :, :, row, column]
            )
    return padded[:, above : above + height, left : left + width].permute(0, 3, 1, 2)


class _Matrix(NamedTuple):
    """Filters laid out for maps of one size."""

    dense: Tensor
    taps: tuple[tuple[int, int, int], ...]
    places: tuple[int, int]


def _matrix(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> _Matrix:
    (down, across), (above, left) = stride, padding
    taps, places = _taps(*x.shape[2:], *weight.shape[2:], down, across, above, left)
    return _Matrix(_dense(weight, taps, places, x), taps, places)


def _flat(x: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, height * width * channels]."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _map(flat: Tensor, channels: int, places: tuple[int, ...]) -> Tensor:
    """Undo `_flat`; the result lies in memory as channels_last."""
    return flat.view(len(flat), *places, channels).permute(0, 3, 1, 2)


@cache
def _taps(
    height: int, width: int, rows: int, columns: int, down: int, across: int, above: int, left: int
) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, int]]:
    """Give (new place, place, tap) wherever a tap meets the map, and the size of the new map."""
    places = _places((height, width), (rows, columns), (down, across), (above, left))
    found: list[tuple[int, int, int]] = []
    for new in range(places[0] * places[1]):
        top, start = new // places[1] * down - above, new % places[1] * across - left
        for place in range(height * width):
            row, column = place // width - top, place % width - start
            if 0 <= row < rows and 0 <= column < columns:
                found.append((new, place, row * columns + column))
    return tuple(found), places


def _dense(weight: Tensor, taps: tuple[tuple[int, int, int], ...], places: tuple[int, int], x: Tensor) -> Tensor:
    """Lay the taps out as a matrix [new places * out, places * in] in the dtype of `x`; zeros where none meets."""
    by_tap = weight.permute(0, 2, 3, 1).flatten(1, 2)  # [out, taps, in]
    if len(taps) == 1:
        return by_tap[:, taps[0][2]].to(x.dtype)
    out, _, into = by_tap.shape
    dense = x.new_zeros(places[0] * places[1], out, x.shape[2] * x.shape[3], into)
    for new, place, tap in taps:
        dense[new, :, place] = by_tap[:, tap]
    return dense.view(len(dense) * out, -1)


def _sparse(matrix: Tensor, weight: Tensor, taps: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Sum what `_dense` laid out back into the shape of the weight, in its dtype."""
    out, into = weight.shape[:2]
    parts = matrix.view(-1, out, matrix.shape[1] // into, into)  # [new places, out, places, in]
    sums: dict[int, Tensor] = {}
    for new, place, tap in taps:
        part = parts[new, :, place].to(weight.dtype)
        sums[tap] = sums[tap] + part if tap in sums else part
    nothing = torch.zeros_like(sums[taps[0][2]])
    count = weight.shape[2] * weight.shape[3]
    by_tap = torch.stack([sums.get(tap, nothing) for tap in range(count)], 1)  # [out, taps, in]
    return by_tap.view(out, *weight.shape[2:], into).permute(0, 3, 1, 2)
