"""What any worker settles that nobody else did: lost workers, waits, and what has expired."""

import pytest
from sqlalchemy import Engine, select, update

from app.domain.jobs import Status, Wanted
from app.store import endings, sweeps, tables
from app.store.attempts import Held
from app.store.blobs import Stored
from app.store.clock import Now
from app.store.session import transaction
from tests.factories import make_dataset, make_job, make_project
from tests.store.holding import attempts_of, codes, expire, look, read, take, want

pytestmark = pytest.mark.store


class TestSweep:
    def test_a_lost_job_goes_on_elsewhere(self, engine: Engine, held: Held) -> None:
        expire(engine, held)
        with transaction(engine) as session:
            assert (held.job_id, False) in sweeps.sweep(session, limit=10_000)
        job = look(engine, held)
        assert (job.status, job.status_reason, job.losses, job.lease_owner) == ("queued", "worker_lost", 1, None)
        (attempt,) = attempts_of(engine, held)
        assert attempt.outcome == "lost"

    def test_a_held_job_is_left_alone(self, engine: Engine, held: Held) -> None:
        with transaction(engine) as session:
            sweeps.sweep(session, limit=10_000)
        assert look(engine, held).status == "starting"

    def test_what_runs_in_this_process_is_not_lost_however_long_the_host_slept(
        self, engine: Engine, held: Held
    ) -> None:
        expire(engine, held)
        with transaction(engine) as session:
            assert (held.job_id, False) not in sweeps.sweep(session, limit=10_000, own=[held.job_id])
        assert look(engine, held).losses == 0

    def test_three_losses_end_the_job(self, engine: Engine, held: Held) -> None:
        for _ in range(3):
            expire(engine, held)
            with transaction(engine) as session:
                sweeps.sweep(session, limit=10_000)
                if read(session, held).status == "queued":
                    held = take(session, read(session, held))
        job = look(engine, held)
        assert job.error is not None
        assert (job.status, job.error["code"]) == ("failed", "crash_loop")
        assert codes(engine, held)[-2:] == ["failed", "failed"]

    @pytest.mark.parametrize(
        ("wish", "status"), [(Wanted.CANCEL, "cancelled"), (Wanted.PAUSE, "paused"), (Wanted.STOP, "cancelled")]
    )
    def test_the_wish_of_a_lost_job_is_honoured(self, engine: Engine, held: Held, wish: Wanted, status: str) -> None:
        want(engine, held, wish)
        expire(engine, held)
        with transaction(engine) as session:
            sweeps.sweep(session, limit=10_000)
        assert look(engine, held).status == status

    def test_a_wait_that_nobody_settled_is_settled(self, engine: Engine, held: Held) -> None:
        """As when two rows were locked by others at the moment of the end."""
        with transaction(engine) as session:
            project = session.get_one(tables.Project, held.project_id)
            endings.finish(session, held, Status.SUCCEEDED, model_id="mdl_made")
            waiting = make_job(session, project, status="waiting", wait_for_job_id=held.job_id)
        with transaction(engine) as session:
            assert (waiting.id, False) in sweeps.sweep(session, limit=10_000)
        job = look(engine, waiting)
        assert (job.status, job.base_model_id) == ("queued", "mdl_made")

    def test_a_round_that_nobody_closed_is_closed(self, engine: Engine) -> None:
        with transaction(engine) as session:
            project = make_project(session)
            closed, open_ = (make_job(session, project, status="waiting") for _ in range(2))
            for parent, statuses in ((closed, ("failed", "succeeded")), (open_, ("failed", "paused"))):
                for key, status in enumerate(statuses):
                    child = make_job(session, project, parent_id=parent.id, child_key=str(key))
                    session.execute(update(tables.Job).where(tables.Job.id == child.id).values(status=status))
        with transaction(engine) as session:
            woken = sweeps.sweep(session, limit=10_000)
        assert (closed.id, False) in woken
        assert (open_.id, False) not in woken
        assert (look(engine, closed).status, look(engine, open_).status) == ("queued", "waiting")

    def test_what_expired_is_forgotten_and_what_is_used_is_not(self, engine: Engine, blob: Stored) -> None:
        with transaction(engine) as session:
            project = make_project(session)
            fresh, old, used = (
                tables.Upload(id=f"upl_{name}_{project.id}", project_id=project.id, bytes=1, sha256=blob.sha256,
                              expires_at=expires)
                for name, expires in (("f", 9e12), ("o", 1.0), ("u", 1.0))
            )  # fmt: skip
            session.add_all([fresh, old, used])
            session.flush()
            make_dataset(session, project, upload_id=used.id)
            for key, created in (("old", 1.0), ("new", Now())):
                session.add(
                    tables.Idempotency(
                        project_id=project.id, route="POST /v1/jobs", key=key, fingerprint="0" * 64, created_at=created
                    )
                )
        with transaction(engine) as session:
            sweeps.sweep(session)
        with transaction(engine) as session:
            uploads = session.scalars(select(tables.Upload.id).where(tables.Upload.project_id == project.id))
            assert set(uploads) == {fresh.id, used.id}
            answers = session.scalars(select(tables.Idempotency.key).where(tables.Idempotency.project_id == project.id))
            assert list(answers) == ["new"]
