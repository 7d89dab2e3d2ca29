"""What tests of compute share: one thread, and one small set of real digits on disk."""

from collections.abc import Iterator

import pytest
import torch

from app.domain.datasets import DatasetFacts
from tests.worker import models, sets
from worker.report import BaseModelInput


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Several test processes share the cores, and two OpenMP threads on a busy core are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DatasetFacts:
    """160 training and 60 test digits, all labelled."""
    return sets.write_set(tmp_path_factory.mktemp("digits"), sets.digits())


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> BaseModelInput:
    """A narrow network that has seen 600 digits without their labels."""
    return models.pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> DatasetFacts:
    """700 digits: more than one batch of every evaluation."""
    return sets.write_set(tmp_path_factory.mktemp("many"), sets.digits(700, 60))
