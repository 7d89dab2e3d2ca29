"""Small sets in the forms that others publish theirs in: CIFAR's pickles and MNIST's idx files."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests import pictures


class Python2:
    """Write pickles with the instructions that Python 2's cPickle wrote the CIFAR files with."""

    def __init__(self) -> None:
        self.out, self.memo = io.BytesIO(), 0

    def put(self) -> None:
        """Remember what was written last."""
        self.out.write(b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo))
        self.memo += 1

    def value(self, item: Any) -> None:
        """Write anything that the files hold."""
        if isinstance(item, dict):
            self.out.write(b"}")
            self.put()
            self.out.write(b"(")
            for key, part in item.items():
                self.value(key)
                self.value(part)
            self.out.write(b"u")
        elif isinstance(item, list):
            self.out.write(b"]")
            self.put()
            self.out.write(b"(")
            for part in item:
                self.value(part)
            self.out.write(b"e")
        elif isinstance(item, int):
            self.out.write(b"K" + bytes([item]) if 0 <= item < 256 else b"J" + struct.pack("<i", item))
        elif isinstance(item, str):
            data = item.encode()
            self.out.write(b"U" + bytes([len(data)]) + data)
            self.put()
        else:
            self.array(item)

    def array(self, array: np.ndarray, dtype: bytes = b"u1") -> None:
        """Write an array as numpy reduces it."""
        rows, columns = array.shape
        self.out.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.put()
        self.out.write(b"cnumpy\nndarray\n")
        self.put()
        self.out.write(b"K\x00\x85U\x01b\x87R")
        self.put()
        self.out.write(b"(K\x01" + b"J" + struct.pack("<i", rows) + b"M" + struct.pack("<H", columns) + b"\x86")
        self.out.write(b"cnumpy\ndtype\nU\x02" + dtype + b"K\x00K\x01\x87R")
        self.out.write(b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
        raw = array.tobytes()
        self.out.write(b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb")

    @classmethod
    def dumps(cls, item: Any) -> bytes:
        """Give a whole pickle."""
        writer = cls()
        writer.out.write(b"\x80\x02")
        writer.value(item)
        writer.out.write(b".")
        return writer.out.getvalue()


def batch(
    seed: int, rows: int, label: str, key: str = "labels", classes: int = 10
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw one batch of CIFAR: its images and what its file holds."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (rows, 3072), dtype=np.uint8)
    content = {
        "batch_label": label, key: draw.integers(0, classes, rows).tolist(), "data": pixels,
        "filenames": [f"thing_{seed}_{n:04d}.png" for n in range(rows)],
    }  # fmt: skip
    return pixels.reshape(-1, 3, 32, 32), content


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(path: Path, **changed: bytes) -> tuple[Path, np.ndarray, np.ndarray, list[int]]:
    """Pack a small CIFAR-10, some of its files changed; give its training and test images and training labels too."""
    parts = [batch(n, 20, f"training batch {n} of 2") for n in (1, 2)]
    test = batch(9, 10, "testing batch 1 of 1")
    files = {
        "cifar-10-batches-py/batches.meta": Python2.dumps({"num_cases_per_batch": 20, "label_names": NAMES}),
        "cifar-10-batches-py/data_batch_2": Python2.dumps(parts[1][1]),
        "cifar-10-batches-py/data_batch_1": Python2.dumps(parts[0][1]),
        "cifar-10-batches-py/test_batch": Python2.dumps(test[1]),
        "cifar-10-batches-py/readme.html": b"<html>",
    }
    files |= {f"cifar-10-batches-py/{name}": data for name, data in changed.items()}
    labels = parts[0][1]["labels"] + parts[1][1]["labels"]
    return pictures.tarred(path, files, "w:gz"), np.concatenate([parts[0][0], parts[1][0]]), test[0], labels


def idx(array: np.ndarray) -> bytes:
    """Write an array as MNIST's files are."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(rows: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw a small MNIST, by the names of its files."""
    draw = np.random.default_rng(seed)
    return {
        "train-images-idx3-ubyte": draw.integers(0, 256, (rows, 9, 7), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(rows) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (rows // 2, 9, 7), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(rows // 2) % 10).astype(np.uint8),
    }
