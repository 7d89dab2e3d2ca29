"""Builtin sets: fetched, checked and kept."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from app.domain.errors import UserFault
from tests import pictures
from tests.pictures import png
from tests.worker.ingested import pixels_of, table
from tests.worker.published import cifar10, idx, mnist
from worker.ingest import builtin, ingest_builtin

pytestmark = pytest.mark.worker


def test_digits_are_the_same_everywhere(tmp_path: Path) -> None:
    made = ingest_builtin("digits", tmp_path / "scratch", tmp_path / "cache")
    assert made.facts.splits == {"train": 1297, "test": 500}
    assert made.facts.classes == tuple("0123456789")
    assert made.facts.image_sizes == {"min_height": 8, "max_height": 8, "min_width": 8, "max_width": 8}
    assert (made.format, made.facts.channels, made.facts.task) == ("builtin:digits", 1, "image_classification")
    counts = made.report["splits"]["test"]["classes"].values()
    assert sum(counts) == 500
    assert min(counts) >= 46
    assert made.report["leakage"]["rows"] == 0
    pixels, labels, test = builtin.digits()
    assert np.array_equal(pixels_of(made, "test")[:, 0], pixels[test])
    assert table(made, "train")["label"].to_pylist() == labels[~test].tolist()
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.flatnonzero(test).tolist() == list(range(1297, 1797)), "the split of published results must not move"


def test_a_builtin_set_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserFault) as caught:
        ingest_builtin("cifar_10", tmp_path / "scratch", tmp_path / "cache")
    assert "did you mean cifar10" in str(caught.value.hint)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserFault) as caught:
        ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache")
    assert caught.value.code == "builtin_unavailable"
    assert "http://127.0.0.1:9/cifar.tar.gz" in caught.value.message
    assert "upload it as a dataset" in str(caught.value.hint)
    assert caught.value.failure().retryable is False
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def served(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> None:
    """Let downloads come from files, by the end of their address."""

    def download(url: str, to: Path, tick: Any) -> None:
        to.write_bytes(files[url.rsplit("/", 1)[-1]].read_bytes())
        tick(1.0)

    monkeypatch.setattr(builtin, "_download", download)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_fetched_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, train, _, _ = cifar10(tmp_path / "cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://nowhere/cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(path))
    served(monkeypatch, {"cifar.tar.gz": path})
    made = ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache")
    assert made.format == "builtin:cifar10"
    assert np.array_equal(pixels_of(made, "train"), train)
    served(monkeypatch, {})
    assert ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache").facts.sha256 == made.facts.sha256
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    served(monkeypatch, {"cifar.tar.gz": path})
    with pytest.raises(UserFault, match="not the expected bytes"):
        ingest_builtin("cifar10", tmp_path / "scratch", tmp_path / "cache")


@pytest.mark.parametrize(("name", "kind"), [("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)])
def test_mnist_and_its_like(name: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = mnist()
    files = {f"{stem}.gz": pictures.gzipped(tmp_path / f"{stem}.gz", idx(array)) for stem, array in arrays.items()}
    monkeypatch.setattr(kind, "resources", [(file, md5(path)) for file, path in files.items()])
    served(monkeypatch, files)
    made = ingest_builtin(name, tmp_path / "scratch", tmp_path / "cache")
    assert made.facts.splits == {"train": 30, "test": 15}
    assert made.facts.classes[9] == ("9" if name == "mnist" else "Ankle boot")


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    draw = np.random.default_rng(0)
    splits: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    train = draw.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    for split, pixels in (("train", train), ("test", train[..., :3])):
        path = files[f"{split}.mat"] = tmp_path / f"{split}.mat"
        savemat(path, {"X": pixels, "y": np.array([[1], [10], [3], [4], [5], [6]][: pixels.shape[3]])})
        splits[split] = [f"http://nowhere/{split}.mat", f"{split}.mat", md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    served(monkeypatch, files)
    made = ingest_builtin("svhn", tmp_path / "scratch", tmp_path / "cache")
    assert table(made, "train")["label"].to_pylist() == [1, 0, 3, 4, 5, 6]
    assert np.array_equal(pixels_of(made, "train"), train.transpose(3, 2, 0, 1))
    assert made.report["leakage"]["rows"] == 3


def test_stl10_has_unlabelled_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    parts = {stem: draw.integers(0, 256, (rows, 3, 96, 96), dtype=np.uint8)
             for stem, rows in (("train", 4), ("test", 3), ("unlabeled", 5))}  # fmt: skip
    files = {f"stl10_binary/{stem}_X.bin": pixels.tobytes() for stem, pixels in parts.items()}
    files |= {"stl10_binary/train_y.bin": bytes([1, 10, 2, 3]), "stl10_binary/test_y.bin": bytes([4, 5, 6])}
    path = pictures.tarred(tmp_path / "stl10.tar.gz", files, "w:gz")
    monkeypatch.setattr(datasets.STL10, "url", "http://nowhere/stl10.tar.gz")
    monkeypatch.setattr(datasets.STL10, "tgz_md5", md5(path))
    served(monkeypatch, {"stl10.tar.gz": path})
    made = ingest_builtin("stl10", tmp_path / "scratch", tmp_path / "cache")
    assert table(made, "train")["label"].to_pylist() == [0, 9, 1, 2, None, None, None, None, None]
    assert np.array_equal(pixels_of(made, "test"), parts["test"].transpose(0, 1, 3, 2))
    assert made.facts.labelled == {"train": 4, "test": 3}


def test_builtin_pictures_are_png(tmp_path: Path) -> None:
    made = ingest_builtin("digits", tmp_path / "scratch", tmp_path / "cache")
    first = table(made, "train")["image"][0].as_py()
    assert first["bytes"].startswith(png()[:8])
    assert first["path"] == "train/0/0000.png"
