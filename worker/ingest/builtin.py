"""Standard sets by name. `digits` lies in scikit-learn; the others are fetched from where torchvision knows them.

What is fetched is checked by its published MD5 and then read by the same readers as an upload: nothing is unpickled.
"""

import contextlib
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

import numpy as np

from app.domain.datasets import SPLITS, Builtin, Split
from app.domain.errors import UserFault
from worker.ingest import cifar, idx
from worker.ingest.archive import Archive
from worker.ingest.directories import Directory
from worker.ingest.rows import Rows, Source, pixel_rows
from worker.ingest.tars import Tar, gunzip
from worker.report import Limits

DIGITS_TEST = 500
_SECONDS = 20.0
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
Tick = Callable[[float], None]


def read(name: str, cache: Path, scratch: Path, limits: Limits, tick: Tick) -> Source:
    """Make a standard set. Raises `UserFault` when there is no such set, or when it cannot be fetched."""
    if name == "digits":
        return _digits()
    if name not in get_args(Builtin):
        close = get_close_matches(name, get_args(Builtin), n=1) or get_args(Builtin)
        raise UserFault(
            f"there is no builtin set {name!r}", code="unknown_builtin", hint=f"did you mean {', '.join(close)}?"
        )
    source = _READERS[name](name, cache / "builtin" / name, scratch, limits, tick)
    source.format = f"builtin:{name}"
    return source


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give scikit-learn's 1,797 digits: pixels `[1797, 8, 8]` 0 to 255, labels, and which of them are test (500).

    The test split is the last 500 in the set's own order, which follows the writers: most hands of the test split are
    not among those of the training split, as it would be in use, and a random split flatters every method.
    """
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    pixels = np.rint(np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(classes).astype(np.int64)
    return pixels, labels, np.arange(len(labels)) >= len(labels) - DIGITS_TEST


def _digits() -> Source:
    pixels, labels, test = digits()
    numbers = np.arange(len(labels))

    def rows() -> Iterator[Rows]:
        parts: tuple[tuple[Split, np.ndarray], ...] = (("train", ~test), ("test", test))
        for split, chosen in parts:
            names = [f"{split}/{labels[row]}/{row:04d}.png" for row in numbers[chosen]]
            yield from pixel_rows(pixels[chosen], labels[chosen], split, names)

    return Source("builtin:digits", tuple(str(n) for n in range(10)), rows(), pixels.nbytes)


def _cifar(name: str, folder: Path, scratch: Path, limits: Limits, tick: Tick) -> Source:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR100 if name == "cifar100" else CIFAR10
    packed = fetch(kind.url, folder / kind.filename, kind.tgz_md5, name, tick)
    with contextlib.closing(_tar(packed, scratch, limits)) as archive:
        wanted = {file for file, _ in (*kind.train_list, *kind.test_list)} | {kind.meta["filename"]}
        chosen = [n for n, entry in enumerate(archive.names) if entry.rsplit("/", 1)[-1] in wanted]
        return cifar.read(archive, chosen, scratch)


def _mnist(name: str, folder: Path, scratch: Path, limits: Limits, tick: Tick) -> Source:
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]
    for file, md5 in kind.resources:
        fetch([mirror + file for mirror in kind.mirrors], folder / file, md5, name, tick)
    archive = Directory(folder, limits)
    source = idx.read_archive(archive, list(range(len(archive.names))), scratch, limits)
    if name != "mnist":
        source.classes = tuple(kind.classes)
    return source


def _svhn(name: str, folder: Path, scratch: Path, limits: Limits, tick: Tick) -> Source:  # noqa: ARG001
    from scipy.io import loadmat
    from torchvision.datasets import SVHN

    parts: list[tuple[Split, np.ndarray, np.ndarray]] = []
    for split in ("train", "test"):
        url, file, md5 = SVHN.split_list[split]
        content = loadmat(fetch(url, folder / file, md5, name, tick), variable_names=["X", "y"])
        labels = content["y"].astype(np.int64).reshape(-1) % 10  # 10 stands for the digit 0
        parts.append((split, content["X"].transpose(3, 2, 0, 1), labels))

    def rows() -> Iterator[Rows]:
        for split, pixels, labels in parts:
            yield from pixel_rows(pixels, labels, split)

    total = sum(pixels.nbytes for _, pixels, _ in parts)
    return Source("svhn", tuple(str(n) for n in range(10)), rows(), total)


def _stl10(name: str, folder: Path, scratch: Path, limits: Limits, tick: Tick) -> Source:
    from torchvision.datasets import STL10

    packed = fetch(STL10.url, folder / STL10.filename, STL10.tgz_md5, name, tick)
    with contextlib.closing(_tar(packed, scratch, limits)) as archive:
        for number, entry in enumerate(archive.names):
            if entry.endswith(".bin"):
                archive.unpack(number, scratch / entry.rsplit("/", 1)[-1])
    parts: list[tuple[Split, str, np.ndarray, np.ndarray | None]] = []
    stems: tuple[tuple[str, Split], ...] = (("train", "train"), ("unlabeled", "train"), ("test", "test"))
    for stem, split in stems:
        pixels = np.memmap(scratch / f"{stem}_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
        labels = scratch / f"{stem}_y.bin"
        parts.append((split, stem, pixels, np.fromfile(labels, np.uint8) - 1 if labels.exists() else None))
    parts.sort(key=lambda part: SPLITS.index(part[0]))

    def rows() -> Iterator[Rows]:
        for split, stem, pixels, labels in parts:
            yield from pixel_rows(pixels, labels, split, [f"{stem}/{n:06d}.png" for n in range(len(pixels))])

    return Source("stl10", _STL10, rows(), sum(part[2].nbytes for part in parts))


_READERS: dict[str, Callable[[str, Path, Path, Limits, Tick], Source]] = {
    "cifar10": _cifar, "cifar100": _cifar, "mnist": _mnist, "fashion_mnist": _mnist, "kmnist": _mnist,
    "svhn": _svhn, "stl10": _stl10,
}  # fmt: skip


def _tar(packed: Path, scratch: Path, limits: Limits) -> Archive:
    plain = scratch / "builtin.tar"
    gunzip(packed, plain, limits, lambda _: None)
    return Tar(plain, limits)


def fetch(urls: str | list[str], to: Path, md5: str, name: str, tick: Tick) -> Path:
    """Fetch a file once per host, from the first address that answers. Raises `UserFault` when none does."""
    if to.exists() and _md5(to) == md5:
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    urls = [urls] if isinstance(urls, str) else urls
    partial, reasons = to.with_name(f".{to.name}.{os.getpid()}"), []
    for url in urls:
        try:
            _download(url, partial, tick)
        except (OSError, urllib.error.URLError, ValueError) as error:
            reasons.append(f"{url}: {getattr(error, 'reason', error)}")
            continue
        finally:
            tick(0.0)
        if _md5(partial) == md5:
            partial.replace(to)
            return to
        reasons.append(f"{url}: not the expected bytes")
    partial.unlink(missing_ok=True)
    raise UserFault(
        f"the builtin set {name!r} could not be fetched: {'; '.join(reasons)}", code="builtin_unavailable",
        phase="download", hint=f"download {urls[0]} where there is a network and upload it as a dataset; "
        "`digits` needs no network",
    )  # fmt: skip


def _download(url: str, to: Path, tick: Tick) -> None:
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer, open(to, "wb") as file:  # noqa: S310 (fixed addresses)
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while piece := answer.read(2**20):
            file.write(piece)
            done += len(piece)
            tick(done / total if total else 0.0)


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
