"""Decoded images: once, by one rule, shared safely, within a budget, or while training."""

import hashlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault
from tests.worker import sets
from worker import ticker
from worker.data import encoded, images, shelf
from worker.data.images import Images, Streamed, native_size, open_images
from worker.data.shelf import Shelf
from worker.data.source import ahead, in_order, part
from worker.report import Event, Progress

pytestmark = pytest.mark.worker


def photographs(count: int = 12, height: int = 20, width: int = 14) -> sets.Split:
    draws = np.random.default_rng(1)
    return draws.integers(0, 256, (count, height, width, 3), dtype=np.uint8), np.arange(count) % 3 - 1


def opened(
    facts: DatasetFacts, cache: Path, split: str = "train", **given: Any
) -> tuple[Images | Streamed, sets.Heard]:
    heard = sets.Heard()
    kept = Shelf(cache / "shelf", given.pop("cache_bytes", 10**9))
    options: dict[str, Any] = {"image_size": 8, "channels": facts.channels, "threads": 2, **given}
    return open_images(facts, split, shelf=kept, reporter=heard.reporter, **options), heard


@pytest.fixture
def facts(tmp_path: Path) -> DatasetFacts:
    pixels, labels = photographs()
    return sets.write_set(tmp_path / "set", {"train": (pixels, labels), "test": (pixels[:4], labels[:4])})


def test_rows_are_resized_as_torchvision_does_and_keep_their_labels(facts: DatasetFacts, tmp_path: Path) -> None:
    found, heard = opened(facts, tmp_path)
    pixels, labels = photographs()
    assert heard.codes() == ["data.decoded"]
    batch = found.batch(torch.tensor([5, 0]))
    for place, row in enumerate((5, 0)):
        expected = v2.resize(torch.from_numpy(pixels[row]).permute(2, 0, 1), [8, 8], antialias=True)
        assert torch.equal(batch["image"][place], expected)
    assert batch["label"].tolist() == [labels[5], -1]
    assert batch["index"].tolist() == [5, 0]
    test, _ = opened(facts, tmp_path, "test")
    assert test.batch(torch.tensor([1]))["index"].tolist() == [13], "samples are counted over all splits"


def test_jpegs_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    pixels, labels = photographs(4)
    facts = sets.write_set(tmp_path / "set", {"train": (pixels, labels)}, kind="JPEG")
    found, _ = opened(facts, tmp_path)
    data = torch.frombuffer(bytearray(sets.encoded(pixels[2], "JPEG")), dtype=torch.uint8)
    expected = v2.resize(torch.ops.image.decode_jpeg(data, 3, False), [8, 8], antialias=True)
    assert torch.equal(found.batch(torch.tensor([2]))["image"][0], expected)


def test_small_images_are_kept_as_they_are(digits: DatasetFacts, tmp_path: Path) -> None:
    found, _ = opened(digits, tmp_path)
    pixels, _ = sets.digits()["train"]
    assert np.array_equal(found.batch(torch.arange(160))["image"][:, 0].numpy(), pixels)
    mean = pixels.mean() / 255
    assert found.mean == (pytest.approx(mean, abs=1e-5),)
    assert found.std == (pytest.approx(pixels.std() / 255, abs=1e-5),)
    assert native_size(digits) == 8


@pytest.mark.parametrize("piece", [images.PIECE, 500, 100], ids=["in one piece", "by rows", "by pixels"])
def test_moments_are_those_of_all_pixels(
    facts: DatasetFacts, tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "PIECE", piece)
    found, _ = opened(facts, tmp_path)
    pixels = found.batch(torch.arange(12))["image"].double() / 255
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert found.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_grey_becomes_colour_and_colour_grey(facts: DatasetFacts, digits: DatasetFacts, tmp_path: Path) -> None:
    coloured, _ = opened(digits, tmp_path, channels=3)
    first = coloured.batch(torch.tensor([0]))["image"][0]
    assert torch.equal(first[0], first[1])
    grey, _ = opened(facts, tmp_path, channels=1)
    assert grey.batch(torch.tensor([0]))["image"].shape == (1, 1, 8, 8)


def test_the_second_use_decodes_nothing(facts: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = opened(facts, tmp_path)
    monkeypatch.setattr(encoded, "decode", lambda *_: pytest.fail("decoded again"))
    again, heard = opened(facts, tmp_path)
    assert heard.codes() == ["data.cached"]
    assert torch.equal(again.batch(torch.arange(12))["image"], first.batch(torch.arange(12))["image"])
    assert again.mean == first.mean


def test_decoding_gives_signs_of_life_and_says_how_far_it_is(
    facts: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticker, "SECONDS", 0.0)
    monkeypatch.setattr(images, "CHUNK", 4)
    heard = sets.Heard()
    rows = facts.splits["train"]
    open_images(
        facts, "train", image_size=8, channels=1, shelf=Shelf(tmp_path, 10**9), threads=2, reporter=heard.reporter
    )
    told = [(each.step, each.steps) for each in heard.of(Progress) if each.phase == "decode train"]
    assert told == [(min(done, rows), rows) for done in range(4, rows + 4, 4)]


def test_pieces_are_decoded_side_by_side(facts: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, decoded = threading.Barrier(2), encoded.Encoded.decoded

    def meeting(self: encoded.Encoded, row: int, *given: Any) -> torch.Tensor:
        if row in (0, 3):
            both.wait(30)  # broken, which fails the test, where one piece only begins when the other is done
        return decoded(self, row, *given)

    monkeypatch.setattr(images, "CHUNK", 3)
    monkeypatch.setattr(encoded.Encoded, "decoded", meeting)
    _, heard = opened(facts, tmp_path, threads=2)
    assert heard.codes() == ["data.decoded"]


def test_streaming_gives_the_same_rows_and_an_event(facts: DatasetFacts, tmp_path: Path) -> None:
    mapped, _ = opened(facts, tmp_path)
    streamed, heard = opened(facts, tmp_path / "other", cache_bytes=100)
    assert isinstance(streamed, Streamed)
    assert heard.codes() == ["data.streaming"]
    assert (streamed.mean, streamed.std) == (mapped.mean, mapped.std)
    rows = torch.tensor([7, 2, 2, 11])
    for key, value in mapped.batch(rows).items():
        assert torch.equal(streamed.batch(rows)[key], value)
    some = part(streamed, torch.arange(1, 12, 2))
    read = [(batch_rows.tolist(), batch["index"].tolist()) for batch_rows, batch in ahead(some, in_order(some, 2))]
    assert read == [([0, 1], [1, 3]), ([2, 3], [5, 7]), ([4, 5], [9, 11])]


def test_a_row_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    pixels, labels = photographs(3)
    facts = sets.write_set(tmp_path / "set", {"train": (pixels, labels)})
    path = Path(str(facts.shards[0].path))
    path.write_bytes(path.read_bytes().replace(b"IHDR", b"IHDX", 1))
    shard = facts.shards[0].model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    facts = facts.model_copy(update={"shards": (shard,)})
    with pytest.raises(DataFault, match=r"train/0\.png \(train row 0\) cannot be decoded"):
        opened(facts, tmp_path)
    assert list((tmp_path / "shelf").glob("[!.]*")) == [], "nothing half is left to be found"


def test_several_builders_at_once_make_it_once(facts: DatasetFacts, tmp_path: Path) -> None:
    # The lock is the kernel's and belongs to an open file, so threads meet in it as processes do.
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(opened, facts, tmp_path / "c") for _ in range(4)]
    codes = [heard.codes()[0] for _, heard in (answer.result() for answer in answers)]
    assert sorted(codes) == ["data.cached"] * 3 + ["data.decoded"]
    totals = {int(found.batch(torch.arange(12))["image"].sum()) for found, _ in (answer.result() for answer in answers)}
    assert len(totals) == 1


@pytest.mark.parametrize("name", ["pixels", "labels", "moments"])
def test_a_cache_that_was_cut_short_is_made_anew(name: str, facts: DatasetFacts, tmp_path: Path) -> None:
    first, _ = opened(facts, tmp_path)
    before = first.batch(torch.arange(12))
    (folder,) = (tmp_path / "shelf").glob("[!.]*")
    kept = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(kept[:-5])
    again, heard = opened(facts, tmp_path)
    assert heard.codes() == ["data.decoded"]
    assert all(torch.equal(value, before[key]) for key, value in again.batch(torch.arange(12)).items())


def test_what_a_run_maps_stays_on_the_shelf_and_even_its_removal_changes_nothing(
    facts: DatasetFacts, tmp_path: Path
) -> None:
    found, _ = opened(facts, tmp_path)
    before = found.batch(torch.arange(12))["image"].clone()
    (kept,) = (tmp_path / "shelf").glob("[!.]*")
    with pytest.raises(shelf.NoRoom, match="in use by running jobs"):
        Shelf(tmp_path / "shelf", 10**6).get("other", {"x": 10**6}, lambda _: None)
    assert [path.name for path in (tmp_path / "shelf").glob("[!.]*")] == [kept.name]
    shutil.rmtree(kept)
    assert torch.equal(found.batch(torch.arange(12))["image"], before)


@pytest.mark.parametrize(
    ("limit", "says"), [("budget", "TUNEYARD_CACHE_BYTES allows 1.0 kB"), ("disk", "disk has room for 2.0 kB")]
)
def test_streaming_says_how_much_is_wanted_and_which_limit_is_short(
    limit: str, says: str, facts: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=shelf.FREE_FLOOR_BYTES + 2000)
        monkeypatch.setattr(shelf.shutil, "disk_usage", lambda _: usage)
    _, heard = opened(facts, tmp_path, cache_bytes=1000 if limit == "budget" else 10**9)
    (event,) = heard.of(Event)
    assert event.code == "data.streaming"
    assert "would take 2.4 kB, and" in event.message  # 12 x 3 x 8 x 8 bytes, 12 labels, two moments of 3 channels
    assert says in event.message
    assert "TUNEYARD_CACHE_BYTES" in event.message
