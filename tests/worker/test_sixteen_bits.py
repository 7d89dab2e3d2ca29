"""Images of 16 bits keep them: from the PNG through the cache and the batch to the lines of the model card."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.domain.datasets import DatasetFacts
from app.domain.models import ModelConfig
from tests.worker import sets
from tests.worker.test_model_card import paste, write_images
from worker import ingest
from worker.data.images import Images, Streamed, open_images
from worker.data.shelf import Shelf
from worker.data.source import Data, part
from worker.recipe import Batch

pytestmark = pytest.mark.worker
CPU = torch.device("cpu")


def gradient(channels: int, count: int = 6, size: int = 8) -> np.ndarray:
    """Give images whose 64 shades all lie within one step of 8 bits."""
    ramp = (np.arange(size * size) * 3).reshape(size, size)
    images = np.stack([30_000 + number + ramp for number in range(count)]).astype(np.uint16)
    return images if channels == 1 else np.stack([images, images + 20_000, images // 2], 3).astype(np.uint16)


def opened(facts: DatasetFacts, cache: Path, **given: Any) -> tuple[Images | Streamed, sets.Heard]:
    heard = sets.Heard()
    shelf = Shelf(cache / "shelf", given.pop("cache_bytes", 10**9))
    options: dict[str, Any] = {"image_size": 8, "channels": facts.channels, "threads": 1, **given}
    return open_images(facts, "train", shelf=shelf, reporter=heard.reporter, **options), heard


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def channels(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def facts(channels: int, tmp_path: Path) -> DatasetFacts:
    return sets.write_set(tmp_path / "set", {"train": (gradient(channels), np.arange(6) % 2)})


def planes(channels: int) -> np.ndarray:
    """Give the same images as [n, channels, height, width] of float64 in [0, 1]."""
    images = gradient(channels)
    return (images[:, None] if channels == 1 else images.transpose(0, 3, 1, 2)) / 65535


def data(source: Images | Streamed, prepare: Any = None) -> Data:
    rows = part(source, torch.arange(len(source)))
    return Data(rows, None, None, prepare, torch.tensor(source.mean), torch.tensor(source.std))


def test_a_gradient_finer_than_eight_bits_reaches_the_batch(channels: int, facts: DatasetFacts, tmp_path: Path) -> None:
    found, _ = opened(facts, tmp_path)
    batch = found.batch(torch.tensor([4, 0, 4]))
    assert batch["image"].dtype == torch.uint16
    assert np.array_equal(batch["image"].numpy() / 65535, planes(channels)[[4, 0, 4]])
    expected = planes(channels)
    assert found.mean == pytest.approx(expected.mean((0, 2, 3)), abs=1e-8)
    assert found.std == pytest.approx(expected.std((0, 2, 3)), rel=1e-4)
    ready = data(found).ready(found.batch(torch.arange(6)), CPU)["image"]
    assert len(ready[0, 0].unique()) == 64, "in 8 bits there would be one or two"
    assert ready.mean().item() == pytest.approx(0, abs=1e-2)
    assert ready.std().item() == pytest.approx(1, abs=1e-2)


def test_the_cache_keeps_two_bytes_and_is_used_again(channels: int, facts: DatasetFacts, tmp_path: Path) -> None:
    first, heard = opened(facts, tmp_path)
    assert heard.codes() == ["data.decoded"]
    (folder,) = (tmp_path / "shelf").glob("[!.]*")
    assert (folder / "pixels").stat().st_size == 6 * channels * 64 * 2
    again, heard = opened(facts, tmp_path)
    assert heard.codes() == ["data.cached"]
    rows = torch.arange(6)
    assert torch.equal(*(each.batch(rows)["image"].view(torch.int16) for each in (first, again)))
    _, heard = opened(facts.model_copy(update={"bits": 8}), tmp_path)
    assert heard.codes() == ["data.decoded"], "the same digest at 8 bits is another entry"


def test_streaming_gives_the_same_rows(facts: DatasetFacts, tmp_path: Path) -> None:
    mapped, _ = opened(facts, tmp_path / "one")
    streamed, _ = opened(facts, tmp_path / "two", cache_bytes=50)
    assert isinstance(streamed, Streamed)
    assert (streamed.mean, streamed.std) == (mapped.mean, mapped.std)
    rows = torch.tensor([5, 1, 1])
    assert torch.equal(*(each.batch(rows)["image"].view(torch.int16) for each in (streamed, mapped)))


def test_resizing_keeps_the_bits_too(channels: int, facts: DatasetFacts, tmp_path: Path) -> None:
    found, _ = opened(facts, tmp_path, image_size=4)
    images = torch.from_numpy(planes(channels))
    expected = torch.nn.functional.interpolate(images, (4, 4), mode="bilinear", antialias=True) * 65535
    made = found.batch(torch.arange(6))["image"].double()
    assert (made - expected).abs().max() <= 0.51, "rounded, and nothing else"


def test_inputs_see_floats_between_nought_and_one(channels: int, facts: DatasetFacts, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def look(batch: Batch, generator: torch.Generator) -> Batch:
        seen.append(batch["image"])
        return batch

    found, _ = opened(facts, tmp_path)
    data(found, look).ready(found.batch(torch.arange(6)), CPU, torch.Generator())
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0].double(), torch.from_numpy(planes(channels)), rtol=0, atol=1e-7)


def test_grey_becomes_colour_and_colour_grey(channels: int, facts: DatasetFacts, tmp_path: Path) -> None:
    found, _ = opened(facts, tmp_path, channels=4 - channels)
    image = found.batch(torch.tensor([2]))["image"][0].double()
    given = torch.from_numpy(planes(channels)[2] * 65535)
    if channels == 1:
        assert torch.equal(image, given.expand(3, -1, -1))
    else:
        luma = (given * torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(0)
        assert (image[0] - luma).abs().max() <= 0.51


def test_ingest_says_what_it_found_and_eight_bits_among_sixteen_are_widened(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for number, image in enumerate(gradient(1, count=3)):
        path = folder / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sets.encoded(image))
    (folder / "train" / "class0" / "9.png").write_bytes(sets.encoded(np.full((8, 8), 200, np.uint8)))
    heard = sets.Heard()
    made = ingest.ingest_folder(str(folder), tmp_path / "scratch", reporter=heard.reporter, threads=1)
    assert (made.facts.bits, made.facts.channels) == (16, 1)
    assert made.report["modes"]["sixteen_bit"] == 3
    assert "3 of 4 images have 16 bits a channel: all are trained on at 16" in made.report["warnings"]
    found, _ = opened(made.facts, tmp_path)
    images = found.batch(torch.arange(4))["image"].int()
    assert sorted(images.amax((1, 2, 3)).tolist()) == sorted([30_189, 30_190, 30_191, 200 * 257])
    eight = sets.write_set(tmp_path / "eight", sets.digits(20, 10))
    assert eight.bits == 8
    assert opened(eight, tmp_path)[0].batch(torch.arange(2))["image"].dtype == torch.uint8


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_what_only_sixteen_bits_show_can_be_learned_and_the_card_repeats_it(colour: bool, tmp_path: Path) -> None:
    """Digits drawn within one step of 8 bits: to who shifts the low byte away all of them are one flat grey."""
    hidden = {
        split: ((32_768 + np.rint(pixels / 255 * 16).astype(np.uint16) * 12), labels)
        for split, (pixels, labels) in sets.digits().items()
    }
    assert len(np.unique(hidden["train"][0] >> 8)) == 1
    if colour:
        hidden = {
            split: (np.stack([pixels, pixels + 600, pixels - 900], 3), labels)
            for split, (pixels, labels) in hidden.items()
        }
    facts = sets.write_set(tmp_path / "set", hidden)
    job = sets.spec(
        training={"epochs": 12, "precision": "float32", "learning_rate": 3e-3}, params={"augmentation": "light"},
        model={"architecture": "small_cnn", "width": 0.25, "image_size": 12},
    )  # fmt: skip
    order = sets.order(job, facts, tmp_path)
    _, last = sets.finished(order)
    assert (last.metrics["test/accuracy"] or 0) > 0.5
    folder = Path(order.scratch) / "model"
    config = ModelConfig.model_validate_json((folder / "config.json").read_text())
    assert config.bits == 16
    labels = write_images(facts, "test", folder / "images")
    answers = paste(folder, len(labels))
    accuracy = sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels)
    assert accuracy == pytest.approx(last.metrics["test/accuracy"], abs=0.017), "one image of sixty may round otherwise"
