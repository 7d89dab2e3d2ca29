"""Passes without gradients go in smaller pieces where memory runs out, and nowhere else."""

import pytest
import torch
from torch import Tensor

from app.domain.errors import ResourceFault
from worker.parts.memory import in_pieces, not_training

pytestmark = pytest.mark.unit


class Room:
    """A pass that doubles numbers and has room for some rows."""

    def __init__(self, most: int, message: str = "CUDA out of memory. Tried to allocate 2 GiB") -> None:
        self.most, self.message = most, message
        self.sizes: list[int] = []

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        size = len(batch["image"])
        if size > self.most:
            raise RuntimeError(self.message)
        self.sizes.append(size)
        return batch["image"] * 2


ROWS = {"image": torch.arange(60), "label": torch.arange(60)}


def test_what_fits_goes_in_one_piece() -> None:
    room = Room(60)
    (made,) = in_pieces(room)(ROWS)
    assert torch.equal(made, ROWS["image"] * 2)
    assert room.sizes == [60]


def test_pieces_are_as_large_as_fits_for_the_whole_pass_and_not_for_the_next() -> None:
    room = Room(20)
    run = in_pieces(room)
    assert torch.equal(torch.cat(run(ROWS)), ROWS["image"] * 2)
    assert room.sizes == [15] * 4
    room.sizes.clear()
    run({"image": torch.arange(20)})
    assert room.sizes == [10, 10], "not tried again at its full size"
    room.sizes.clear()
    in_pieces(room)({"image": torch.arange(20)})
    assert room.sizes == [20]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bfloat16])
def test_whatever_a_batch_holds_can_be_cut(dtype: torch.dtype) -> None:
    given = torch.arange(7).to(dtype)
    seen: list[Tensor] = []

    def look(batch: dict[str, Tensor]) -> None:
        if len(batch["image"]) > 3:
            raise MemoryError
        seen.append(batch["image"])

    in_pieces(look)({"image": given})
    assert [len(piece) for piece in seen] == [3, 2, 2]
    assert torch.equal(torch.cat([piece.long() for piece in seen]), torch.arange(7))


def test_below_the_least_the_trouble_is_the_callers() -> None:
    assert len(in_pieces(Room(10), least=10)(ROWS)) == 6
    with pytest.raises(RuntimeError, match="out of memory"):
        in_pieces(Room(9), least=10)(ROWS)
    with pytest.raises(RuntimeError, match="out of memory"):
        in_pieces(Room(0))(ROWS)
    odd = Room(13)
    in_pieces(odd, least=10)({"image": torch.arange(25)})
    assert odd.sizes == [13, 12]
    with pytest.raises(RuntimeError, match="out of memory"):
        in_pieces(Room(12), least=10)({"image": torch.arange(25)})
    assert in_pieces(Room(1))({"image": torch.arange(0)})[0].shape == (0,)


def test_another_error_is_passed_on_at_once() -> None:
    room = Room(20, message="shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        in_pieces(room)(ROWS)
    with pytest.raises(RuntimeError, match="shapes"), not_training():
        room(ROWS)


def test_out_of_memory_outside_of_training_has_a_name_of_its_own() -> None:
    with pytest.raises(ResourceFault, match="between the steps of training") as raised, not_training():
        Room(1)(ROWS)
    assert (raised.value.code, raised.value.phase) == ("out_of_memory", "evaluate")


def test_no_rows_are_one_piece() -> None:
    assert [len(made) for made in in_pieces(Room(1))({"image": torch.empty(0)})] == [0]
