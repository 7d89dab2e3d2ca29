"""Jobs as the API sees and steers them; their life itself is in `life`, the worker's half in `claims`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, delete, func, or_, select
from sqlalchemy.orm import Session, aliased

from app.domain.errors import Conflict, NotFound, TooManyRequests
from app.domain.jobs import HELD, TERMINAL, Actor, Status, Verb, Wanted, on_request
from app.store import checkpoints, events, life, owned, tables
from app.store.clock import Now
from app.store.page import Page, read, with_metadata


@dataclass(frozen=True)
class Surroundings:
    """What the answer about a job says beside its own row."""

    position: int | None = None  # in the queue, from 1
    children: dict[str, int] = field(default_factory=dict)  # by status
    children_done: float = 0.0  # how much of the children is done, 0 to 1; a running one counts by its own progress
    no_worker_fits: bool = False
    files: Sequence[tables.JobFile] = ()


def find(session: Session, project_id: str, job_id: str) -> tables.Job:
    """Give a job of this project."""
    return owned.find(session, tables.Job, job_id, project_id)


def page_of(
    session: Session,
    project_id: str,
    page: Page,
    *,
    statuses: Sequence[str] = (),
    recipe: str | None = None,
    parent: str | None = None,
    kind: str | None = None,
    metadata: dict[str, str] | None = None,
) -> tuple[list[tables.Job], bool]:
    """Give a page of a project's jobs; internal ones only when asked for by kind."""
    query = select(tables.Job).where(tables.Job.project_id == project_id, tables.Job.deleted_at.is_(None))
    query = query.where(tables.Job.internal.is_(kind == "internal"))
    for column, value in ((tables.Job.recipe, recipe), (tables.Job.parent_id, parent), (tables.Job.kind, kind)):
        if value is not None:
            query = query.where(column == value)
    if statuses:
        query = query.where(tables.Job.status.in_(statuses))
    return read(session, with_metadata(query, tables.Job.meta, metadata or {}), tables.Job.id, page)


def surroundings(session: Session, jobs: Sequence[tables.Job], *, alive_seconds: float) -> dict[str, Surroundings]:
    """Look around many jobs at once: a constant number of queries for a whole page."""
    children: dict[str, dict[str, int]] = defaultdict(dict)
    if jobs:
        counted = (
            select(tables.Job.parent_id, tables.Job.status, func.count())
            .where(tables.Job.parent_id.in_([job.id for job in jobs]))
            .group_by(tables.Job.parent_id, tables.Job.status)
        )
        for parent_id, status, count in session.execute(counted):
            children[str(parent_id)][status] = count
    done = _done(session, children)
    queued = [job for job in jobs if job.status == Status.QUEUED]
    positions = _positions(session, [job.id for job in queued]) if queued else {}
    offers = _offers(session, alive_seconds) if queued else []
    made = files(session, [job.id for job in jobs])
    return {
        job.id: Surroundings(
            position=positions.get(job.id),
            children=children.get(job.id, {}),
            children_done=done.get(job.id, 0.0),
            no_worker_fits=job in queued and not any(_fits(job, gpus) for gpus in offers),
            files=made[job.id],
        )
        for job in jobs
    }


def _done(session: Session, children: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Give how much is done of the children of each parent, counted by status."""
    done = {
        parent: float(sum(count for status, count in counts.items() if status in TERMINAL))
        for parent, counts in children.items()
    }
    at_work = [parent for parent, counts in children.items() if any(status in counts for status in HELD)]
    if at_work:
        held = select(tables.Job.parent_id, tables.Job.progress).where(
            tables.Job.parent_id.in_(at_work), tables.Job.status.in_(HELD)
        )
        for parent_id, progress in session.execute(held):
            done[str(parent_id)] += float((progress or {}).get("fraction") or 0.0)
    return {parent: share / sum(children[parent].values()) for parent, share in done.items()}


def doubts(session: Session, job: tables.Job, *, alive_seconds: float) -> list[str]:
    """Say what would keep a job waiting that is not queued yet."""
    if any(_fits(job, gpus) for gpus in _offers(session, alive_seconds)):
        return []
    return [f"No living worker fits device {job.device!r} and {job.gpus} GPU(s) now; the job would wait for one."]


def _positions(session: Session, ids: Sequence[str]) -> dict[str, int]:
    """Count who would be claimed before each of these queued jobs: higher priority first, then age."""
    mine, before = aliased(tables.Job), aliased(tables.Job)
    goes_first = and_(
        before.status == Status.QUEUED,
        before.internal == mine.internal,
        before.not_before <= Now(),
        or_(before.priority > mine.priority, and_(before.priority == mine.priority, before.id < mine.id)),
    )
    counted = (
        select(mine.id, func.count(before.id)).outerjoin(before, goes_first).where(mine.id.in_(ids)).group_by(mine.id)
    )
    return {job_id: count + 1 for job_id, count in session.execute(counted)}


def _offers(session: Session, alive_seconds: float) -> list[int]:
    """Give the number of GPUs of every worker that lives and takes jobs."""
    living = select(tables.Worker.gpus).where(
        tables.Worker.heartbeat_at > Now() - alive_seconds, tables.Worker.draining.is_(False)
    )
    return [len(gpus) for gpus in session.scalars(living)]


def _fits(job: tables.Job, gpus: int) -> bool:
    """Say whether a worker with so many GPUs could ever take the job; `auto` takes one GPU or the processor."""
    needs_gpus = job.device == "cuda" or (job.device == "auto" and job.gpus > 1)
    return not needs_gpus or gpus >= job.gpus


def insert(session: Session, job: tables.Job, *, max_queued_jobs: int, warnings: Iterable[str] = ()) -> None:
    """Insert a job, unless its project has as many unfinished ones as it may; calls of one project take turns.

    Its log begins with the warnings.

    Raises:
        TooManyRequests: the project's queue is full.
    """
    # Not the strongest lock: that one would also hold up every insert that merely refers to the project.
    session.get(tables.Project, job.project_id, with_for_update={"key_share": True})
    unfinished = session.scalar(
        select(func.count())
        .select_from(tables.Job)
        .where(tables.Job.project_id == job.project_id, tables.Job.status.not_in(TERMINAL))
    )
    if (unfinished or 0) >= max_queued_jobs:
        raise TooManyRequests(
            f"This project has {unfinished} unfinished jobs, as many as it may; wait for one to end or cancel some.",
            code="too_many_jobs", retry_after=30,
        )  # fmt: skip
    life.insert(session, job)
    for warning in warnings:
        events.append(session, job, type="log", code="spec.doubtful", level="warning", message=warning)


def request(session: Session, project_id: str, job_id: str, verb: Verb) -> tables.Job:
    """Do what a user asks of a job and, in the same transaction, of its children.

    Raises:
        NotFound: this project has no such job.
        Conflict: the verb makes no sense in its state.
    """
    job = owned.find(session, tables.Job, job_id, project_id, lock=True)
    if job.internal and verb != "cancel":
        raise Conflict(
            f"An internal job can only be cancelled; it is {job.status}.", code=f"cannot_{verb}", status=job.status
        )
    children = session.scalars(
        select(tables.Job)
        .where(tables.Job.parent_id == job.id, tables.Job.status.not_in(TERMINAL))
        .order_by(tables.Job.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    obeyed = {"pause": Wanted.PAUSE, "resume": Wanted.RUN, "stop": Wanted.STOP}
    if children and job.status == Status.WAITING and verb in obeyed and (verb == "stop" or job.wanted != Wanted.STOP):
        _wish(session, job, obeyed[verb])  # it holds no slot: its children obey, and it goes on when they have ended
    else:
        _request(session, job, verb)
    for child in children:
        try:
            _request(session, child, verb)
        except Conflict:
            continue  # a child may be elsewhere than its parent; what makes no sense for it is left out
    return job


def _request(session: Session, job: tables.Job, verb: Verb) -> None:
    decision = on_request(verb, Status(job.status), Wanted(job.wanted), has_checkpoint=checkpoints.exist(session, job))
    if decision.status is not None:
        life.move(session, job, decision.status, actor=Actor.API, reason=decision.reason, wanted=decision.wanted)
    elif decision.wanted is not None:
        _wish(session, job, decision.wanted)


def _wish(session: Session, job: tables.Job, wanted: Wanted) -> None:
    if job.wanted == wanted:
        return
    job.wanted = wanted
    if job.status in HELD:  # the worker that holds it hears of it at once, not at its next heartbeat
        session.info.setdefault("wake", []).append((job.id, job.internal))
    events.append(
        session, job, type="log", code=f"wanted.{wanted}", message=f"The job was asked to {wanted}.",
        data={"status": job.status, "wanted": str(wanted)},
    )  # fmt: skip


def files(session: Session, job_ids: Sequence[str]) -> dict[str, list[tables.JobFile]]:
    """Give the files that many runs made besides models, by job, each in order of their names."""
    found: dict[str, list[tables.JobFile]] = {job_id: [] for job_id in job_ids}
    query = select(tables.JobFile).where(tables.JobFile.job_id.in_(job_ids)).order_by(tables.JobFile.name)
    for one in session.scalars(query):
        found[one.job_id].append(one)
    return found


def file(session: Session, job_id: str, name: str) -> tables.JobFile:
    """Give one file of a job.

    Raises:
        NotFound: the job has no file of that name.
    """
    found = session.get(tables.JobFile, (job_id, name))
    if found is None:
        raise NotFound("This job has no file of that name; GET …/files lists them.", code="no_such_file")
    return found


def remove(session: Session, project_id: str, job_id: str) -> None:
    """Delete a job that ended, with its children: the rows stay as tombstones, everything they kept is let go.

    Raises:
        Conflict: it has not ended, or an unfinished job goes on from one of its checkpoints.
    """
    job = owned.find(session, tables.Job, job_id, project_id, lock=True)
    if job.status not in TERMINAL:
        raise Conflict(f"A job that is {job.status} cannot be deleted; cancel it first.", code="job_not_finished",
                       status=job.status)  # fmt: skip
    doomed = [job, *session.scalars(select(tables.Job).where(tables.Job.parent_id == job.id).with_for_update())]
    ids = [one.id for one in doomed]
    kept = select(tables.Checkpoint.id).where(tables.Checkpoint.job_id.in_(ids))
    heir = session.scalar(
        select(tables.Job.id).where(tables.Job.resume_from.in_(kept), tables.Job.status.not_in(TERMINAL)).limit(1)
    )
    if heir is not None:
        raise Conflict(f"The job {heir} goes on from a checkpoint of this one; delete this when it has ended.",
                       code="in_use", status=job.status, job=heir)  # fmt: skip
    _drop(session, ids)
    for one in doomed:
        one.deleted_at = session.scalar(select(Now()))


def _drop(session: Session, ids: Iterable[str]) -> None:
    tables_of_a_job: tuple[Any, ...] = (
        tables.Event, tables.Metric, tables.Checkpoint, tables.JobFile, tables.Attempt,
    )  # fmt: skip
    for table in tables_of_a_job:
        session.execute(
            delete(table).where(table.job_id.in_(list(ids))).execution_options(synchronize_session=False)
        )  # fmt: skip
