"""Datasets as a trainer gets them, made in a moment: real digits or plain patterns, in shards on disk."""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from app.domain.datasets import DatasetFacts, Shard
from worker import catalogue
from worker.report import Failed, Finished, Message, Order, Reporter, Saved
from worker.trainer import local, process

Split = tuple[np.ndarray, np.ndarray]  # uint8 [n, height, width] or [n, height, width, 3], and labels with -1 for none


def digits(train: int = 160, test: int = 60) -> dict[str, Split]:
    """Give the first of scikit-learn's digits, 8x8."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return {"train": (pixels[:train], labels[:train]), "test": (pixels[-test:], labels[-test:])}


def write_set(
    folder: Path, splits: dict[str, Split], *, classes: int = 10, rows_per_shard: int = 100, kind: str = "PNG"
) -> DatasetFacts:
    """Write shards in the canonical form and describe them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    for split, (pixels, labels) in splits.items():
        for index, start in enumerate(range(0, len(labels), rows_per_shard)):
            path = folder / f"{split}-{index:05d}.arrow"
            rows = range(start, min(start + rows_per_shard, len(labels)))
            images = [{"bytes": encoded(pixels[row], kind), "path": f"{split}/{row}.{kind.lower()}"} for row in rows]
            column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            known = pa.array([None if labels[row] < 0 else int(labels[row]) for row in rows], pa.int64())
            table = pa.table({"image": column, "label": known})
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=64)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shards.append(
                Shard.model_validate(
                    {"split": split, "index": index, "rows": len(rows), "sha256": digest, "path": str(path),
                     "bytes": path.stat().st_size}
                )
            )  # fmt: skip
    first = next(iter(splits.values()))[0]
    return DatasetFacts(
        id="ds_local", sha256=hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest(),
        task="image_classification", classes=tuple(str(n) for n in range(classes)),
        splits={split: len(labels) for split, (_, labels) in splits.items()}, features={"image": "image"},
        labelled={split: int((labels >= 0).sum()) for split, (_, labels) in splits.items()},
        image_sizes={f"{end}_{side}": first.shape[1 + at] for end in ("min", "max")
                     for at, side in enumerate(("height", "width"))},
        channels=1 if first.ndim == 3 else 3, bits=8 * first.dtype.itemsize, shards=tuple(shards),
    )  # fmt: skip


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Encode one image; uint16 as a PNG of 16 bits."""
    if pixels.dtype == np.uint16:
        return png_of_16_bits(pixels)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Encode [height, width] or [height, width, 3] of uint16, which Pillow cannot do in colour."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# The smallest network that has everything: convolutions, batch norm, pooling.
NETWORK = {"architecture": "small_cnn", "width": 0.125}
SMALL_VIT = {"architecture": "small_vit", "patch": 2, "width": 32, "depth": 2, "heads": 2}


def spec(recipe: str = "image_classification", **given: Any) -> dict[str, Any]:
    """Give a small job: two epochs of five steps on one thread's worth of work."""
    training = {"epochs": 2, "batch_size": 16, **given.pop("training", {})}
    known = catalogue.recipes().get(recipe)
    families = known.requires.architectures if known is not None else None
    network = NETWORK if families is None or "convolutional" in families else SMALL_VIT
    data = {"data": {"labels_per_class": 5}} if known is not None and known.requires.unlabelled else {}
    return {"recipe": recipe, "model": network, "training": training, **data, **given}


class Heard:
    """A reporter's listener that keeps what it heard and may wish for something at some message."""

    def __init__(self, wish: Callable[[Message], str | None] = lambda _: None) -> None:
        self.messages: list[Message] = []
        self._wish = wish
        self.reporter = Reporter(listener=self._hear)

    def _hear(self, message: Message) -> None:
        self.messages.append(message)
        wish = self._wish(message)
        if wish is not None:
            self.reporter.want(wish)  # type: ignore[arg-type]

    def of(self, kind: type[Any]) -> list[Any]:
        """Give the messages of one kind."""
        return [message for message in self.messages if isinstance(message, kind)]

    def codes(self) -> list[str]:
        """Give the codes of all events, in order."""
        return [message.code for message in self.messages if message.__class__.__name__ == "Event"]  # type: ignore[attr-defined]

    def metrics(self) -> list[tuple[str, int, float | None]]:
        """Give every metric row, in order."""
        return [row for message in self.messages if hasattr(message, "rows") for row in message.rows]  # type: ignore[attr-defined]


def order(spec: dict[str, Any], facts: DatasetFacts, folder: Path, **given: Any) -> Order:
    """Make an order that works below `folder`."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    made = local.local_order(spec, facts, scratch, folder / "cache", threads=1)
    return made.model_copy(update=given)


def frozen(folder: Path, facts: DatasetFacts, **given: Any) -> Order:
    """Give an order to train a head, for long enough that views of the frozen layers are cached."""
    params, training = {"trainable": "head", "augmentation": "light"}, {"epochs": 9, "checkpoint_every": 10}
    return order(spec(params=params, training=training), facts, folder, **given)


def carry_out(given: Order, wish: Callable[[Message], str | None] = lambda _: None) -> tuple[Heard, Finished | Failed]:
    """Run an order in this process; give what was heard, and the last word."""
    heard = Heard(wish)
    process.carry_out(given, heard.reporter)
    last = heard.messages[-1]
    assert isinstance(last, Finished | Failed)
    return heard, last


def finished(given: Order, wish: Callable[[Message], str | None] = lambda _: None) -> tuple[Heard, Finished]:
    """Run an order that must not fail."""
    heard, last = carry_out(given, wish)
    assert isinstance(last, Finished), last
    return heard, last


def failed(given: Order, wish: Callable[[Message], str | None] = lambda _: None) -> tuple[Heard, Failed]:
    """Run an order that must fail."""
    heard, last = carry_out(given, wish)
    assert isinstance(last, Failed), last
    assert not heard.of(Finished)
    return heard, last


class Killed(BaseException):
    """As far as a process can go without a word."""


def killed_at(step: int, given: Order) -> str:
    """Carry out an order until the checkpoint of a step is written; give that checkpoint's path."""

    def die(message: Message) -> None:
        if isinstance(message, Saved) and message.step == step:
            raise Killed

    with pytest.raises(Killed):
        carry_out(given, die)
    return str(Path(given.scratch) / f"checkpoint-{step:09d}.safetensors")


def probed(spec: dict[str, Any], facts: DatasetFacts, folder: Path) -> dict[str, float]:
    """Run a pretraining job and give what its last probe read from the features: k-NN and linear accuracy."""
    heard, last = carry_out(order(spec, facts, folder))
    assert isinstance(last, Finished), last
    rows = [(name.removeprefix("probe/"), value) for name, _, value in heard.metrics() if name.startswith("probe/")]
    return {name: value for name, value in rows if value is not None}


def untrained(spec: dict[str, Any], facts: DatasetFacts, folder: Path) -> dict[str, float]:
    """Probe the same job's network as it starts: some epochs at no learning rate settle batch norm's statistics.

    After twenty steps a tenth of their own start is left in them, and the network looks worse than it is.
    """
    training = {**spec["training"], "epochs": 3, "learning_rate": 1e-12}
    return probed({**spec, "training": training}, facts, folder)


def before_and_after(spec: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Give the accuracy of k-NN on features of 600 digits, from the network that a job starts with and from its own."""
    facts = write_set(folder / "set", digits(600, 60))
    before, after = untrained(spec, facts, folder / "untrained"), probed(spec, facts, folder / "trained")
    return before["knn_accuracy"], after["knn_accuracy"]


def weights_sha256(order: Order) -> str:
    """Hash the exported weights."""
    return hashlib.sha256((Path(order.scratch) / "model" / "model.safetensors").read_bytes()).hexdigest()
