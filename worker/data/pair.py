"""Two random views of every image: the inputs of the recipes that compare views."""

from collections.abc import Callable
from dataclasses import replace

from torch import Generator

from worker.data.policy import simclr_view, views
from worker.recipe import Batch, Info


def two_views(
    info: Info, *, colour_strength: float | None, crop_min_scale: float | None, flip: float | None
) -> Callable[[Batch, Generator], Batch]:
    """Draw two of SimCLR's views of every image and lay them behind one another: "image" [2 * batch, …].

    Args:
        colour_strength: scales the colour jitter; None takes what suits the image size, as in `simclr_view`.
        crop_min_scale: least part of the area a crop keeps; None takes what suits the size.
        flip: probability of mirroring; None is 0.5, and 0 for greyscale images.
    """
    view = simclr_view(image_size=info.image_size, channels=info.channels, strength=colour_strength)
    if crop_min_scale is not None:
        view = replace(view, crop_scale=(crop_min_scale, 1.0))
    if flip is not None:
        view = replace(view, flip=flip)
    pair = views(view, 2)

    def draw(batch: Batch, generator: Generator) -> Batch:
        return {**batch, "image": pair(batch["image"], generator)}

    return draw
