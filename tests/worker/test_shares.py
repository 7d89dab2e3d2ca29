"""A process draws for the whole batch and augments its own share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.spec import Training
from tests.worker import objectives
from worker.data import policy, shares
from worker.data.augment import to_float
from worker.data.rand_augment import RandAugment
from worker.data.source import Data
from worker.parts import distributed
from worker.parts.seed import generator
from worker.recipe import Batch

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


class Elsewhere(Tensor):
    """What says that it lives on a GPU, and comes back when asked to."""

    @property
    def device(self) -> torch.device:  # pyright: ignore
        return torch.device("cuda", 0)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.as_subclass(Tensor)


class Resident:
    """Rows whose images live on a GPU."""

    slow = False
    labels = torch.arange(32) % 2

    def __init__(self, dtype: torch.dtype) -> None:
        self._pixels = torch.zeros(32, 3, 8, 8, dtype=dtype).as_subclass(Elsewhere)

    def __len__(self) -> int:
        return 32

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        return {"image": self._pixels[: len(rows)], "label": self.labels[rows]}

    def numbers(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_whether_a_part_will_do_is_tried_on_the_cpu_as_inputs_see_images(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    view = VIEWS["standard"]
    assert view is not None

    def prepare(batch: Batch, draws: torch.Generator) -> Batch:
        seen.append(batch["image"])
        return {**batch, "image": view(batch["image"][:, :1], draws)}

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    data = Data(Resident(dtype), None, None, prepare, torch.zeros(1), torch.ones(1))
    share = shares.Share(data, objectives.plan(Training(batch_size=32), 32), without_labels=True)
    assert len(share.rows(torch.arange(32))) == 16
    assert [type(images) for images in seen] == [Tensor, Tensor]
    assert seen[0].dtype == (torch.uint8 if dtype == torch.uint8 else torch.float32)


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
