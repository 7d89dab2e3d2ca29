"""Memory that runs out: how that looks, and passes without gradients, which then go in smaller pieces by themselves."""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from app.domain.errors import ResourceFault

Found = TypeVar("Found")
_SIGNS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "status_alloc_failed",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether this is how Python or torch tell that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error).lower() for text in _SIGNS)


def let_go(error: BaseException) -> None:
    """Free what the frames of a failed step hold: as long as they are there its activations fill the memory."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def not_training() -> Iterator[None]:
    """Name what runs out of memory in here: smaller micro-batches, the answer in training, would change nothing.

    Raises:
        ResourceFault: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceFault(
            f"Out of memory between the steps of training: {error}", code="out_of_memory", phase="evaluate",
            hint="Use a smaller network or smaller images.",
        ) from error  # fmt: skip


def in_pieces(
    run: Callable[[dict[str, Tensor]], Found], *, least: int = 1
) -> Callable[[dict[str, Tensor]], list[Found]]:
    """Make of a forward pass without gradients one that goes in smaller pieces where memory ran out, at first in one.

    What a sample gets in eval mode does not depend on those beside it, but for rounding: kernels are chosen by size.
    So the size of pieces lasts for one pass over a source and is forgotten after it. A run that was interrupted repeats
    whole passes, and with the same memory they fall into the same pieces: the same bits. What `run` draws by itself
    (the evaluation of `vae` and `mae`) it draws for each piece.

    Args:
        run: takes a batch whose tensors have one row per sample.
        least: samples that `run` needs at once; memory that does not hold them is the caller's trouble.

    Returns:
        what takes a batch and gives what `run` made of its pieces, in order.
    """
    most: int | None = None

    def pieces(batch: dict[str, Tensor]) -> list[Found]:
        nonlocal most
        rows = len(next(iter(batch.values())))
        while True:
            size = min(rows, most or rows)
            try:
                count = max(1, min(-(-rows // max(size, 1)), rows // least))
                return [run(piece) for piece in _cut(batch, count)]
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size <= least:
                    raise
            most = max(least, size // 2)  # after the handler, whose error holds the tensors that are to be freed
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    return pieces


def _cut(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    if count == 1:
        return [batch]
    columns = {key: value.tensor_split(count) for key, value in batch.items()}
    return [{key: parts[number] for key, parts in columns.items()} for number in range(count)]
