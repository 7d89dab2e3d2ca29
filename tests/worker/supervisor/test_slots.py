"""Slots: nobody blocks, nothing is given twice, ingest has a slot of its own."""

import threading

import pytest

from worker.supervisor.slots import Gpu, Slots, cores, parse_gpus

pytestmark = pytest.mark.unit

GPUS = tuple(Gpu(str(index), "card", 2**30) for index in range(4))


def test_every_job_takes_one_slot_where_there_are_no_gpus() -> None:
    slots = Slots(2)
    assert slots.devices == {"cpu"}
    first = slots.take(internal=False, gpus=1)
    assert (slots.free(internal=False), slots.busy) == (1, 1)
    slots.take(internal=False)
    with pytest.raises(LookupError, match="0 are free"):
        slots.take(internal=False)
    slots.give_back(first)
    assert slots.free(internal=False) == 1


def test_an_internal_job_has_a_slot_of_its_own() -> None:
    slots = Slots(1)
    training = slots.take(internal=False)
    ingest = slots.take(internal=True)
    assert (slots.free(internal=False), slots.free(internal=True)) == (0, 0)
    with pytest.raises(LookupError, match="internal"):
        slots.take(internal=True)
    slots.give_back(ingest)
    assert (slots.free(internal=False), slots.free(internal=True)) == (0, 1)
    slots.give_back(training)
    assert (slots.free(internal=False), slots.free(internal=True)) == (1, 1)


def test_a_gpu_job_gets_all_its_gpus_or_none() -> None:
    slots = Slots(1, GPUS)
    assert slots.training == 4
    assert slots.devices == {"cpu", "cuda"}
    pair = slots.take(internal=False, gpus=2)
    assert pair.gpus == ("0", "1")
    with pytest.raises(LookupError, match="3 slots are wanted and 2 are free"):
        slots.take(internal=False, gpus=3)
    assert slots.free(internal=False) == 2
    slots.give_back(pair)
    assert slots.take(internal=False, gpus=4).gpus == ("0", "1", "2", "3")


def test_claims_of_one_class_go_one_after_the_other() -> None:
    slots = Slots(8)
    seen: list[int] = []

    def claim() -> None:
        with slots.claiming(internal=False) as free:
            seen.append(free)
            slots.take(internal=False)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(1, 9))


def test_gpus_are_read_as_the_driver_prints_them_and_as_the_environment_narrows_them() -> None:
    answer = "0, GPU-aa, NVIDIA H200, 143771\n1, GPU-bb, NVIDIA H200, 143771\nbroken line\n"
    every = parse_gpus(answer)
    assert [gpu.index for gpu in every] == ["0", "1"]
    assert every[0].memory_bytes == 143771 * 2**20
    assert [gpu.index for gpu in parse_gpus(answer, ("1",))] == ["1"]
    assert [gpu.index for gpu in parse_gpus(answer, ("GPU-bb", "GPU-aa"))] == ["GPU-bb", "GPU-aa"]
    assert parse_gpus(answer, ()) == ()


def test_there_is_at_least_one_core() -> None:
    assert cores() >= 1
