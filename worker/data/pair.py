"""Two random views of every image: the inputs of the recipes that compare views."""

from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Generator, Tensor

from worker.data.policy import Augment, View, byol_view, simclr_view, views
from worker.recipe import Batch, Info, PretrainParams


class ViewParams(PretrainParams):
    """What may be changed of the views."""

    colour_strength: float | None = Field(
        default=None, ge=0, le=2, description="Scales the colour jitter; null is 1, and 0.5 up to 32 pixels."
    )
    crop_min_scale: float | None = Field(
        default=None, gt=0, le=1, description="Least part of the area a crop keeps; null takes what suits the size."
    )
    flip: float | None = Field(
        default=None, ge=0, le=1, description="Probability of mirroring; null is 0.5, and 0 for greyscale images."
    )
    vertical_flip: float = Field(
        default=0.0, ge=0, le=1, description="Probability of turning upside down, for images without an up."
    )


def adjusted(view: View, params: ViewParams) -> View:
    """Give the view with the crop and the mirrors that were asked for."""
    if params.crop_min_scale is not None:
        view = replace(view, crop_scale=(params.crop_min_scale, 1.0))
    if params.flip is not None:
        view = replace(view, flip=params.flip)
    return replace(view, vertical_flip=params.vertical_flip)


def two_views(params: ViewParams, info: Info) -> Callable[[Batch, Generator], Batch]:
    """Draw two of SimCLR's views of every image and lay them behind one another: "image" [2 * batch, …]."""
    view = simclr_view(image_size=info.image_size, channels=info.channels, strength=params.colour_strength)
    return _drawn(views(adjusted(view, params), 2))


def byol_views(params: ViewParams, info: Info) -> Callable[[Batch, Generator], Batch]:
    """Draw both of BYOL's views of every image, which differ in blur and solarisation: "image" [2 * batch, …]."""
    given = {"image_size": info.image_size, "channels": info.channels, "strength": params.colour_strength}
    first, second = (adjusted(byol_view(number, **given), params) for number in (0, 1))

    def both(images: Tensor, generator: Generator) -> Tensor:
        return torch.cat([first(images, generator), second(images, generator)])

    return _drawn(both)


def _drawn(draw: Augment) -> Callable[[Batch, Generator], Batch]:
    return lambda batch, generator: {**batch, "image": draw(batch["image"], generator)}
