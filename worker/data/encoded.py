"""The encoded images of one split, read by row and brought to one size.

Every image is resized to a square (bilinear, antialiased) with torchvision's own function, so that the lines in a model
card repeat it. Nothing is cut off: what lies at the edge of a picture may be its subject.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc  # here, so that warm trainers have it: it takes a fifth of a second
import torch
import torchvision.transforms.v2.functional as v2
from torch import Tensor

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault
from worker.data.staged import Staged
from worker.parts.decode import Undecodable, decode


class Encoded:
    """The encoded bytes of one split, read by row from its Arrow shards.

    They are read from the file and not from a memory map, which ends in a fatal signal when the file is cut short.

    Raises:
        SystemFault: a shard is not what ingest wrote.
    """

    def __init__(self, facts: DatasetFacts, split: str) -> None:
        self.split, self.bits = split, facts.bits
        self._staged: list[Staged] = []
        self._files = list[pa.OSFile]()
        self._paths = list[pa.Array]()
        places, labels = list[np.ndarray](), list[np.ndarray]()
        for shard in sorted((s for s in facts.shards if s.split == split), key=lambda s: s.index):
            staged = Staged(shard, facts.id)
            staged.check()
            self._staged.append(staged)
            mapped = pa.memory_map(staged.path).read_buffer()
            table = pa.ipc.open_stream(mapped).read_all()
            for chunk in table["image"].chunks:
                if not len(chunk):
                    continue
                places.append(_places(chunk.field("bytes"), mapped.address, number=len(self._files)))
                self._paths.append(chunk.field("path"))
            self._files.append(pa.OSFile(staged.path))
            if "label" in table.column_names:
                labels.append(pc.fill_null(table["label"], -1).to_numpy().astype(np.int64))
            else:
                labels.append(np.full(len(table), -1, np.int64))
        self._starts = np.cumsum([0, *(len(chunk) for chunk in places)])
        self._places = np.concatenate(places) if places else np.empty((0, 3), np.int64)
        self.labels = torch.from_numpy(np.concatenate(labels)) if labels else torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Iterable[int]) -> list[bytes]:
        """Read rows, and make sure afterwards that the shards are still what ingest wrote.

        In this order no byte comes to a decoder that ingest has not vetted, whenever the disk changed.

        Raises:
            SystemFault: a shard is not what it was.
        """
        found = [self._files[file].read_at(length, at) for file, at, length in self._places[list(rows)].tolist()]
        for staged in self._staged:
            staged.check()
        return found

    def decoded(self, row: int, data: bytes, channels: int, size: int) -> Tensor:
        """Decode what was read of a row to uint8 or uint16 [channels, size, size].

        Raises:
            DataFault: it cannot be decoded; the message names the file and the row.
        """
        try:
            return (fit_wide if self.bits == 16 else fit)(decode(data), channels, size)
        except Undecodable as error:
            chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
            name = self._paths[chunk][row - int(self._starts[chunk])].as_py()
            raise DataFault(
                f"{name or 'An image'} ({self.split} row {row}) cannot be decoded: {error}.", code="undecodable_image",
                hint="Upload the dataset again without it.",
            ) from error  # fmt: skip


def _places(chunk: pa.Array, start: int, *, number: int) -> np.ndarray:
    """Say where an array of bytes lies in the file mapped at `start`: int64 [rows, 3], of file, place and length."""
    _, offsets, values = chunk.buffers()
    wide = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
    bounds = np.frombuffer(offsets, wide)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
    files = np.full(len(chunk), number, np.int64)
    return np.stack([files, bounds[:-1] + (values.address - start), np.diff(bounds)], 1)


def fit(image: Tensor, channels: int, size: int) -> Tensor:
    """Bring a decoded image [1 or 3, height, width] to uint8 [channels, size, size]."""
    image = in_bytes(image)
    if len(image) != channels:
        image = image.expand(3, -1, -1) if channels == 3 else v2.rgb_to_grayscale(image)
    return image if image.shape[1:] == (size, size) else v2.resize_image(image, [size, size], antialias=True)


def in_bytes(images: Tensor) -> Tensor:
    """Give images of 16 bits as uint8; others are left as they are."""
    return (images.to(torch.int32) >> 8).to(torch.uint8) if images.dtype == torch.uint16 else images


def fit_wide(image: Tensor, channels: int, size: int) -> Tensor:
    """Bring a decoded image [1 or 3, height, width] to uint16 [channels, size, size]; 8 bits become 16."""
    wide = image.float() * (1 if image.dtype == torch.uint16 else 257)
    if len(wide) != channels:
        wide = wide.expand(3, -1, -1) if channels == 3 else v2.rgb_to_grayscale(wide)
    if wide.shape[1:] != (size, size):
        wide = v2.resize_image(wide, [size, size], antialias=True)
    return wide.round().clamp(0, 65535).to(torch.int32).to(torch.uint16)
