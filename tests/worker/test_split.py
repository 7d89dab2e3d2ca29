"""Which labels a run may see."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import UserFault
from app.domain.spec import Data
from worker.data.split import split_labels

pytestmark = pytest.mark.unit


def labels(*counts: int, none: int = 0) -> torch.Tensor:
    made = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)] + [torch.full((none,), -1)])
    return made[torch.randperm(len(made), generator=torch.Generator().manual_seed(7))]


@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=5).filter(any),
    none=st.integers(0, 30),
    fraction=st.floats(0.01, 1),
    per_class=st.none() | st.integers(1, 50),
    held=st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_and_within_the_budget(
    counts: list[int], none: int, fraction: float, per_class: int | None, held: float, seed: int
) -> None:
    given_labels = labels(*counts, none=none)
    data = Data(label_fraction=fraction, labels_per_class=per_class, validation_fraction=held)
    found = split_labels(given_labels, data, seed=seed, validate=True)
    together = torch.cat([found.train, found.validation, found.unlabelled])
    assert together.sort()[0].tolist() == list(range(len(given_labels)))
    for number, count in enumerate(counts):
        in_train = int((given_labels[found.train] == number).sum())
        kept = in_train + int((given_labels[found.validation] == number).sum())
        budget = min(per_class, count) if per_class else min(max(1, int(count * fraction + 0.5)), count)
        assert kept == budget
        assert in_train >= min(1, count)
    assert (given_labels[found.train] >= 0).all()
    again = split_labels(given_labels, data, seed=seed, validate=True)
    assert torch.equal(found.train, again.train)
    assert torch.equal(found.validation, again.validation)


def test_a_smaller_budget_is_part_of_a_larger_one() -> None:
    given_labels = labels(50, 30)
    kept = [
        set(split_labels(given_labels, Data(labels_per_class=k), seed=3, validate=False).train.tolist())
        for k in (1, 5, 20, 100)
    ]
    for small, large in pairwise(kept):
        assert small < large


def test_another_seed_keeps_other_labels() -> None:
    given_labels = labels(50, 50)
    one, two = (split_labels(given_labels, Data(labels_per_class=5), seed=s, validate=False).train for s in (0, 1))
    assert one.tolist() != two.tolist()


def test_validation_is_left_out_where_the_dataset_brings_its_own() -> None:
    found = split_labels(labels(20, 20), Data(), seed=0, validate=False)
    assert len(found.validation) == 0
    assert len(found.train) == 40


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(UserFault, match="No training sample has a label"):
        split_labels(torch.full((5,), -1), Data(), seed=0, validate=True)
