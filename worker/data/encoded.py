"""The encoded images of one split, read by row and brought to one size.

Every image is resized to a square (bilinear, antialiased) with torchvision's own function, so that the lines in a model
card repeat it. Nothing is cut off: what lies at the edge of a picture may be its subject.
"""

import numpy as np
import pyarrow as pa
import torch
import torchvision.transforms.v2.functional as v2
from torch import Tensor

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault
from worker.data.staged import Staged
from worker.parts.decode import Undecodable, decode


class Encoded:
    """The encoded bytes of one split: Arrow shards mapped into memory, read by row.

    Raises:
        SystemFault: a shard is not what ingest wrote.
    """

    def __init__(self, facts: DatasetFacts, split: str) -> None:
        self.split, self.bits = split, facts.bits
        self._staged: list[Staged] = []
        columns: list[pa.ChunkedArray] = []
        labels: list[np.ndarray] = []
        for shard in sorted((s for s in facts.shards if s.split == split), key=lambda s: s.index):
            staged = Staged(shard, facts.id)
            staged.check()
            self._staged.append(staged)
            table = pa.ipc.open_stream(pa.memory_map(staged.path)).read_all()
            columns.append(table["image"])
            if "label" in table.column_names:
                labels.append(table["label"].fill_null(-1).to_numpy().astype(np.int64))
            else:
                labels.append(np.full(len(table), -1, np.int64))
        chunks = [chunk for column in columns for chunk in column.chunks]
        self._bytes = [chunk.field("bytes") for chunk in chunks]
        self._paths = [chunk.field("path") for chunk in chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self.labels = torch.from_numpy(np.concatenate(labels)) if labels else torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def check(self) -> None:
        """Make sure that the shards are still what ingest wrote; asked before every batch and after the last.

        Raises:
            SystemFault: one is not.
        """
        for staged in self._staged:
            staged.check()

    def decoded(self, row: int, channels: int, size: int) -> Tensor:
        """Decode one row to uint8 or uint16 [channels, size, size].

        Raises:
            DataFault: it cannot be decoded; the message names the file and the row.
        """
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[chunk])
        try:
            # Arrow calls its bytes signed; the decoder compares them with 0xFF.
            data = memoryview(self._bytes[chunk][place].as_buffer()).cast("B")
            return (fit_wide if self.bits == 16 else fit)(decode(data), channels, size)
        except Undecodable as error:
            name = self._paths[chunk][place].as_py()
            raise DataFault(
                f"{name or 'An image'} ({self.split} row {row}) cannot be decoded: {error}.", code="undecodable_image",
                hint="Upload the dataset again without it.",
            ) from error  # fmt: skip


def fit(image: Tensor, channels: int, size: int) -> Tensor:
    """Bring a decoded image [1 or 3, height, width] to uint8 [channels, size, size]."""
    image = in_bytes(image)
    if len(image) != channels:
        image = image.expand(3, -1, -1) if channels == 3 else v2.rgb_to_grayscale(image)
    return image if image.shape[1:] == (size, size) else v2.resize(image, [size, size], antialias=True)


def in_bytes(images: Tensor) -> Tensor:
    """Give images of 16 bits as uint8; others are left as they are."""
    return (images.to(torch.int32) >> 8).to(torch.uint8) if images.dtype == torch.uint16 else images


def fit_wide(image: Tensor, channels: int, size: int) -> Tensor:
    """Bring a decoded image [1 or 3, height, width] to uint16 [channels, size, size]; 8 bits become 16."""
    wide = image.float() * (1 if image.dtype == torch.uint16 else 257)
    if len(wide) != channels:
        wide = wide.expand(3, -1, -1) if channels == 3 else v2.rgb_to_grayscale(wide)
    if wide.shape[1:] != (size, size):
        wide = v2.resize(wide, [size, size], antialias=True)
    return wide.round().clamp(0, 65535).to(torch.int32).to(torch.uint16)
