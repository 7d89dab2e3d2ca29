"""Pictures drawn with tensors alone: grids and contact sheets of images, maps of points; encoded as PNG."""

import colorsys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as v2
from torch import Tensor

LEAST, MOST = 64, 96  # pixels a side at which an image is shown
PADDING = 2
GREY = (0.62, 0.62, 0.62)
_GOLDEN = 0.618033988749895  # of the colour circle from one colour to the next: neighbours always differ well
_ALPHA = 0.75


def png(image: Tensor) -> bytes:
    """Encode one image, uint8 [1 or 3, height, width]."""
    # The operator itself, because torchvision's function warns of its deprecation on every call.
    return torch.ops.image.encode_png.default(image.contiguous(), 6).numpy().tobytes()


def grid(images: Tensor, columns: int) -> Tensor:
    """Lay images [n, channels, size, size], bytes or floats in [0, 1], into rows of `columns`: uint8."""
    made = torchvision.utils.make_grid(_shown(images), nrow=columns, padding=PADDING)
    return (made * 255).round().to(torch.uint8)


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """Lay groups of images below each other, one row [n, channels, size, size] per group; missing ones are white."""
    columns = max(len(row) for row in rows)
    filled: list[Tensor] = []
    for row in rows:
        shown = _shown(row)
        filled.append(torch.cat([shown, torch.ones(columns - len(row), *shown.shape[1:])]))
    made = torchvision.utils.make_grid(torch.cat(filled), nrow=columns, padding=PADDING)
    return (made * 255).round().to(torch.uint8)


def _shown(images: Tensor) -> Tensor:
    """Bring images to float in [0, 1] and a size to look at: small ones larger pixel by pixel, large ones smaller."""
    images = images.cpu()
    if images.shape[-1] > MOST:
        images = v2.resize(images, [MOST, MOST], antialias=True)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    scale = max(1, LEAST // pixels.shape[-1])
    return F.interpolate(pixels, scale_factor=scale) if scale > 1 else pixels


def colours(count: int) -> list[tuple[float, float, float]]:
    """Give `count` colours that are easy to tell apart, red, green and blue in [0, 1]."""
    # Strengths in turn, so that a hue that comes near an earlier one (8, 13, 21 later) is lighter or darker than it.
    strengths = ((0.75, 0.85), (0.95, 0.6), (0.5, 0.95), (0.95, 0.98), (0.45, 0.65))
    return [colorsys.hsv_to_rgb((0.02 + at * _GOLDEN) % 1, *strengths[at % len(strengths)]) for at in range(count)]


def hexadecimal(colour: tuple[float, float, float]) -> str:
    """Write a colour as `#rrggbb`."""
    return "#" + "".join(f"{round(part * 255):02x}" for part in colour)


def scatter(points: Tensor, groups: Tensor, *, side: int = 720, radius: float | None = None) -> Tensor:
    """Draw points as discs on white, coloured by group: uint8 [3, side, side].

    Where discs overlap their colours mix, so the picture does not depend on the order of the points.

    Args:
        points: [n, 2]; the 99 % of them that lie innermost fill the picture, the others are moved to its edge.
        groups: int64 [n]; grey below 0.
    """
    count = len(points)
    radius = radius or min(7.0, max(2.0, side / (4 * max(count, 1) ** 0.5)))
    place = _placed(points.detach().double().cpu(), side, 2 * radius + 2)
    known = int(groups.max()) + 1 if count else 0
    palette = torch.tensor([*colours(max(known, 0)), GREY])  # the last one is at -1
    ink = palette[groups.cpu().clamp(min=-1)]  # [n, 3]
    reach = int(radius + 1.5)
    offsets = torch.cartesian_prod(torch.arange(-reach, reach + 1), torch.arange(-reach, reach + 1))
    pixels = place.round().long()[:, None] + offsets  # [n, patch, 2] as column, row
    distance = (pixels - place[:, None]).norm(dim=2)
    cover = ((radius + 0.5 - distance).clamp(0, 1) * _ALPHA).float().flatten()  # one pixel of smooth edge
    at = (pixels[..., 1].clamp(0, side - 1) * side + pixels[..., 0].clamp(0, side - 1)).flatten()
    weight = torch.zeros(side * side).index_add(0, at, cover)
    clear = torch.zeros(side * side).index_add(0, at, torch.log1p(-cover))  # log of what shines through all discs
    mixed = torch.zeros(side * side, 3).index_add(
        0, at, cover[:, None] * ink[:, None].expand(-1, len(offsets), -1).flatten(0, 1)
    )
    colour = mixed / weight.clamp(min=1e-6)[:, None]
    through = clear.exp()[:, None]
    image = colour * (1 - through) + through
    return (image.T.reshape(3, side, side) * 255).round().to(torch.uint8)


def _placed(points: Tensor, side: int, margin: float) -> Tensor:
    """Move points into the picture: column and row of pixels, float64 [n, 2]; one scale for both axes."""
    if not len(points):
        return points
    low, high = points.quantile(0.005, 0), points.quantile(0.995, 0)
    span = float((high - low).max())
    centre = (low + high) / 2
    unit = (points - centre) / (span or 1.0)  # most in [-0.5, 0.5]
    unit[:, 1] = -unit[:, 1]  # rows count downwards
    return unit.clamp(-0.5, 0.5) * (side - 2 * margin) + side / 2
