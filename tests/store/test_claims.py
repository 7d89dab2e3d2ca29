"""Which job a worker takes."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app.store import claims, tables
from app.store.clock import Now
from app.store.session import transaction
from tests.factories import make_job, make_project
from tests.store.holding import attempts_of, look, read, take

pytestmark = pytest.mark.store

CPU = frozenset({"cpu"})
GPU = frozenset({"cpu", "cuda"})


class TestClaim:
    """Which job is taken."""

    @pytest.fixture
    def queue(self, engine: Engine) -> Callable[..., str | None]:
        """Claim from a queue that holds only the given jobs: the others of the database are put away meanwhile."""

        def claim(
            *jobs: dict[str, Any], devices: frozenset[str] = CPU, gpus_free: int = 0, gpus: int = 0,
            internal: bool = False,
        ):  # fmt: skip
            with Session(engine, expire_on_commit=False) as session, session.begin() as outer:
                session.execute(update(tables.Job).where(tables.Job.status == "queued").values(status="paused"))
                project = make_project(session)
                names = {make_job(session, project, **columns).id: columns.get("name") for columns in jobs}
                found = claims.claim(
                    session, worker="w", source="poll", internal=internal, devices=devices, gpus_free=gpus_free,
                    gpus=gpus, lease_seconds=30,
                )  # fmt: skip
                outer.rollback()
                return names[found[0].job_id] if found else None

        return claim

    def test_priority_goes_before_age(self, queue: Callable[..., str | None]) -> None:
        assert queue({"name": "old"}, {"name": "urgent", "priority": 5}, {"name": "new"}) == "urgent"

    def test_age_decides_among_equals(self, queue: Callable[..., str | None]) -> None:
        assert queue({"name": "old"}, {"name": "new"}) == "old"

    def test_backing_off_is_respected(self, queue: Callable[..., str | None]) -> None:
        assert queue({"name": "later", "not_before": 9e12}, {"name": "now"}) == "now"

    def test_an_empty_queue_gives_nothing(self, queue: Callable[..., str | None]) -> None:
        assert queue() is None
        assert queue({"name": "later", "not_before": 9e12}) is None

    @pytest.mark.parametrize("internal", [True, False])
    def test_the_two_classes_do_not_mix(self, queue: Callable[..., str | None], internal: bool) -> None:
        jobs = ({"name": "False"}, {"name": "True", "internal": True, "kind": "internal", "priority": -1})
        assert queue(*jobs, internal=internal) == str(internal)

    @pytest.mark.parametrize(
        ("device", "gpus", "on_cpu", "one_gpu_free", "no_gpu_free"),
        [
            ("cpu", 1, True, True, True),
            ("auto", 1, True, True, False),
            ("auto", 2, False, False, False),
            ("cuda", 1, False, True, False),
            ("cuda", 2, False, False, False),
        ],
    )
    def test_a_job_goes_only_where_it_fits(
        self, queue: Callable[..., str | None], device: str, gpus: int, on_cpu: bool, one_gpu_free: bool,
        no_gpu_free: bool,
    ) -> None:  # fmt: skip
        job = {"name": "it", "device": device, "gpus": gpus}
        assert (queue(job) == "it") is on_cpu
        assert (queue(job, devices=GPU, gpus_free=1) == "it") is one_gpu_free
        assert (queue(job, devices=GPU, gpus_free=0) == "it") is no_gpu_free
        assert queue({**job, "internal": True, "kind": "internal"}, devices=GPU, internal=True) == "it"

    @pytest.mark.parametrize(
        ("device", "gpus", "on_cpu", "on_gpus"),
        [
            ("cpu", 1, "internal", "internal"),
            ("auto", 1, "internal", "training"),
            ("auto", 2, None, "training"),
            ("cuda", 1, None, "training"),
            ("cuda", 3, None, None),
        ],
    )
    def test_a_measuring_job_takes_the_slot_that_the_measured_job_would(
        self, queue: Callable[..., str | None], device: str, gpus: int, on_cpu: str | None, on_gpus: str | None
    ) -> None:
        job = {
            "name": "it", "device": device, "gpus": gpus, "internal": True, "kind": "internal", "recipe": "measure",
        }  # fmt: skip
        for internal, slot in ((True, "internal"), (False, "training")):
            assert (queue(job, internal=internal) == "it") is (on_cpu == slot)
            assert (queue(job, devices=GPU, gpus_free=2, gpus=2, internal=internal) == "it") is (on_gpus == slot)
        assert queue(job, devices=GPU, gpus_free=0, gpus=2) is None

    @pytest.mark.parametrize(
        ("big", "small", "gpus_free", "taken"),
        [
            ({"created_at": 0.0}, {}, 1, None),  # it has waited long enough: the host is kept for it
            ({}, {}, 1, "small"),  # it has not
            ({"created_at": 0.0}, {"priority": 1}, 1, "small"),  # what is more urgent still goes first
            ({"created_at": 0.0}, {"device": "cpu"}, 1, "small"),  # this one takes no GPU from it
            ({"created_at": 0.0, "internal": True, "kind": "internal", "recipe": "measure"}, {}, 1, None),
            ({"created_at": 0.0, "gpus": 8}, {}, 1, "small"),  # it will never fit this host
            ({"created_at": 0.0}, {}, 4, "big"),  # and now it fits
        ],
    )
    def test_a_big_job_is_not_starved_by_small_ones(
        self, queue: Callable[..., str | None], big: dict[str, Any], small: dict[str, Any], gpus_free: int,
        taken: str | None,
    ) -> None:  # fmt: skip
        jobs = ({"name": "big", "device": "cuda", "gpus": 4, **big}, {"name": "small", "device": "auto", **small})
        assert queue(*jobs, devices=GPU, gpus_free=gpus_free, gpus=4) == taken

    def test_a_claim_takes_a_lease_and_opens_an_attempt(self, engine: Engine, job: tables.Job) -> None:
        with transaction(engine) as session:
            now = session.scalar(select(Now()))
            held = take(session, read(session, job), seconds=30)
        taken = look(engine, job)
        assert (taken.status, taken.attempt, taken.lease_owner) == ("starting", 1, "worker")
        assert taken.lease_expires_at is not None
        assert taken.started_at is not None
        assert now is not None
        assert now + 29 < taken.lease_expires_at < now + 40
        (attempt,) = attempts_of(engine, held)
        assert (attempt.attempt, attempt.worker, attempt.source, attempt.closed_at) == (1, "worker", "poll", None)
