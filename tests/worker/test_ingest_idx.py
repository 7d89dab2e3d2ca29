"""MNIST's idx files: read right, and refused with the place and the correction."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.errors import DataFault
from tests import pictures
from tests.worker.ingested import ingest, pixels_of, table
from tests.worker.published import idx, mnist

pytestmark = pytest.mark.worker


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("packer", [pictures.zipped, pictures.tarred, pictures.foldered])
def test_mnist_in_an_archive(packer: Any, packed: bool, tmp_path: Path) -> None:
    arrays = mnist()
    files = {
        f"MNIST/raw/{name}{'.gz' if packed else ''}": gzip.compress(idx(array)) if packed else idx(array)
        for name, array in arrays.items()
    }
    made = ingest(packer(tmp_path / "upload", files), tmp_path)
    assert (made.format, made.facts.channels) == ("idx", 1)
    assert made.facts.classes == tuple("0123456789")
    assert made.facts.splits == {"train": 30, "test": 15}
    assert np.array_equal(pixels_of(made, "train")[:, 0], arrays["train-images-idx3-ubyte"])
    assert table(made, "test")["label"].to_pylist() == arrays["t10k-labels-idx1-ubyte"].tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_a_single_idx_file_is_unlabelled(packed: bool, tmp_path: Path) -> None:
    images = mnist()["train-images-idx3-ubyte"]
    path = tmp_path / "upload"
    path.write_bytes(gzip.compress(idx(images)) if packed else idx(images))
    made = ingest(path, tmp_path)
    assert (made.facts.task, made.facts.splits) == ("unlabelled_images", {"train": 30})
    assert np.array_equal(pixels_of(made, "train")[:, 0], images)


def test_two_idx_files_of_any_name_belong_together(tmp_path: Path) -> None:
    arrays = mnist()
    files = {"x.idx": idx(arrays["train-images-idx3-ubyte"]), "y.idx": idx(arrays["train-labels-idx1-ubyte"])}
    assert ingest(pictures.zipped(tmp_path / "upload", files), tmp_path).facts.labelled == {"train": 30}


BAD_IDX: dict[str, tuple[dict[str, bytes], str, str]] = {
    "other counts": ({"train-images-idx3-ubyte": idx(np.zeros((3, 2, 2), np.uint8)),
                      "train-labels-idx1-ubyte": idx(np.zeros(2, np.uint8))}, "invalid_data", "3 images and "),
    "labels only": ({"train-labels-idx1-ubyte": idx(np.zeros(2, np.uint8))}, "no_images", "only labels"),
    "cut": ({"train-images-idx3-ubyte": idx(np.zeros((3, 2, 2), np.uint8))[:-1]}, "damaged_archive",
            "announces 3 x 2 x 2 values and holds 11 bytes"),
    "enormous": ({"train-images-idx3-ubyte": b"\0\0\x08\x03" + b"\xff" * 12}, "damaged_archive",
                 "announces 4294967295"),
    "no pixels": ({"train-images-idx3-ubyte": idx(np.zeros((3, 0, 2), np.uint8))}, "invalid_data", "without pixels"),
    "two dimensions": ({"train-images-idx2-ubyte": idx(np.zeros((3, 2), np.uint8))}, "invalid_data", "2 dimensions"),
    "a bomb": ({"train-images-idx3-ubyte.gz": gzip.compress(b"\0\0\x08\x03" + b"\0" * 2**27)}, "hostile_archive",
               "bomb"),
    "cut gzip": ({"train-images-idx3-ubyte.gz": gzip.compress(idx(mnist()["train-images-idx3-ubyte"]))[:-300]},
                 "damaged_archive", "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IDX)
def test_idx_files_that_do_not_fit(name: str, tmp_path: Path) -> None:
    files, code, words = BAD_IDX[name]
    with pytest.raises(DataFault) as caught:
        ingest(pictures.tarred(tmp_path / "upload", files), tmp_path)
    assert caught.value.code == code
    assert words in caught.value.message
