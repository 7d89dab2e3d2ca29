"""A process draws for the whole batch and augments its own share."""

import pytest
import torch

from worker.data import policy, shares
from worker.data.augment import to_float
from worker.data.rand_augment import RandAugment
from worker.parts.seed import generator

pytestmark = pytest.mark.worker


VIEWS: dict[str, policy.Augment | None] = {
    "light": policy.policy("light", image_size=8, channels=3),
    "standard": policy.policy("standard", image_size=8, channels=1),
    "strong": policy.policy("strong", image_size=8, channels=3),
    "two views": policy.views(policy.simclr_view(image_size=40, channels=3), 2),
    "randaugment": RandAugment(spread=0.5),
}


@pytest.mark.parametrize("name", VIEWS)
def test_draws_of_a_part_are_those_of_the_whole(name: str) -> None:
    view = VIEWS[name]
    assert view is not None
    channels, side = (1 if name == "standard" else 3), (40 if name == "two views" else 8)
    shape = (24, channels, side, side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator(0, "images"))
    whole = to_float(view(images, generator(1, "draws")))
    parts: list[torch.Tensor] = []
    for rank in range(3):
        with shares._SharedDraws(24, rank, 3):
            parts.append(to_float(view(images[8 * rank : 8 * rank + 8], generator(1, "draws"))))
    joined = torch.stack([part.unflatten(0, (-1, 8)) for part in parts], dim=1).flatten(0, 2)
    assert torch.allclose(joined, whole, atol=1e-6)


def test_inputs_that_mix_samples_are_told_from_those_that_do_not() -> None:
    batch = {"image": torch.zeros(8, 1, 8, 8, dtype=torch.uint8), "label": torch.zeros(8, dtype=torch.int64)}
    with pytest.raises(shares._MixesSamples), shares._SharedDraws(16, 0, 2):
        policy.mix(batch, generator(0), mixup=0.4, cutmix=0.0, classes=2)
    coin = [torch.rand(1, generator=generator(0))]
    for rank in range(2):
        with shares._SharedDraws(16, rank, 2):
            coin.append(torch.rand(1, generator=generator(0)))
    assert torch.equal(coin[0], coin[1])
    assert torch.equal(coin[1], coin[2])
