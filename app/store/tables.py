"""The tables. Every time is seconds since the epoch, UTC, by the database's own clock; the API renders ISO 8601."""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)  # fmt: skip
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.store.clock import Now

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

Json = dict[str, Any]
Id = String(40)
Sha256 = String(64)


class Base(DeclarativeBase):
    """The root of all tables."""

    metadata = MetaData(naming_convention=NAMING)
    # none_as_null: a None in a JSON column is SQL's NULL, so that `is null` finds it.
    type_annotation_map = {  # noqa: RUF012
        float: Double, int: BigInteger, Json: JSON(none_as_null=True), list[Any]: JSON(none_as_null=True),
    }  # fmt: skip


class Project(Base):
    """A wall: every object belongs to one project, and no key sees over it."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    created_at: Mapped[float] = mapped_column(server_default=Now())
    deleted_at: Mapped[float | None]


class Key(Base):
    """An API key, stored as prefix and SHA-256."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    prefix: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(Sha256, unique=True)
    scopes: Mapped[list[Any]]  # of read, write, admin, operator
    created_at: Mapped[float] = mapped_column(server_default=Now())
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]


class Session(Base):
    """A browser's cookie, traded for a key; ends with the key."""

    __tablename__ = "sessions"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id", ondelete="CASCADE"), index=True)
    sha256: Mapped[str] = mapped_column(Sha256, unique=True)
    created_at: Mapped[float] = mapped_column(server_default=Now())
    expires_at: Mapped[float]


class Idempotency(Base):
    """The stored answer to a creating POST; `status` is null while the first call runs."""

    __tablename__ = "idempotency"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    route: Mapped[str] = mapped_column(String(200), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(Sha256)
    status: Mapped[int | None] = mapped_column(Integer)
    body: Mapped[Json | None]
    headers: Mapped[Json | None]
    created_at: Mapped[float] = mapped_column(server_default=Now())


class Blob(Base):
    """Bytes by their SHA-256. The row comes before the file and goes with it, under one row lock (see blobs.py)."""

    __tablename__ = "blobs"
    sha256: Mapped[str] = mapped_column(Sha256, primary_key=True)
    bytes: Mapped[int]
    touched_at: Mapped[float] = mapped_column(server_default=Now(), index=True)


class Upload(Base):
    """Raw bytes on their way in."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str | None] = mapped_column(String(512))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    created_at: Mapped[float] = mapped_column(server_default=Now())
    expires_at: Mapped[float | None]  # null once a dataset or model was made of it


class Dataset(Base):
    """Immutable, validated samples; the row lives on as a tombstone after it was deleted."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("project_id", "name", "version"), Index(None, "project_id", "id"))
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    version: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String(16))
    asked_task: Mapped[str | None] = mapped_column(String(40))
    on_error: Mapped[str] = mapped_column(String(8))
    upload_id: Mapped[str | None] = mapped_column(ForeignKey("uploads.id"))
    builtin: Mapped[str | None] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(Id)  # the ingest job; no foreign key, because jobs point back here
    task: Mapped[str | None] = mapped_column(String(40))
    format: Mapped[str | None] = mapped_column(String(40))
    bytes: Mapped[int] = mapped_column(default=0)
    sha256: Mapped[str | None] = mapped_column(Sha256)
    samples: Mapped[int] = mapped_column(default=0)
    facts: Mapped[Json | None]  # domain.datasets.DatasetFacts without shards
    report: Mapped[Json | None]
    error: Mapped[Json | None]
    meta: Mapped[Json] = mapped_column("metadata", default=dict)
    created_at: Mapped[float] = mapped_column(server_default=Now())
    deleted_at: Mapped[float | None]


class Shard(Base):
    """One Arrow file of a dataset."""

    __tablename__ = "shards"
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True)
    split: Mapped[str] = mapped_column(String(16), primary_key=True)
    index: Mapped[int] = mapped_column(Integer, primary_key=True)
    rows: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    thumbnails_bytes: Mapped[int] = mapped_column(default=0)
    thumbnails_sha256: Mapped[str | None] = mapped_column(ForeignKey("blobs.sha256"), index=True)


class Recipe(Base):
    """What a worker can run, published by the worker itself."""

    __tablename__ = "recipes"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    version: Mapped[str] = mapped_column(String(32))
    summary: Mapped[str] = mapped_column(Text)
    tasks: Mapped[list[Any]]
    schema: Mapped[Json]
    defaults: Mapped[Json]
    template: Mapped[Json]
    requires: Mapped[Json]
    published_at: Mapped[float] = mapped_column(server_default=Now())


class Architecture(Base):
    """A network that a worker can build, with its facts and the schema of its options."""

    __tablename__ = "architectures"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    facts: Mapped[Json]
    published_at: Mapped[float] = mapped_column(server_default=Now())


class Job(Base):
    """One run of a recipe. `status` is the holder's word, `wanted` the user's; `attempt` is the fencing token."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("parent_id", "child_key"),
        CheckConstraint(
            "status not in ('starting', 'running') or (lease_expires_at is not null and lease_owner is not null)",
            name="held_has_lease",
        ),
        Index("ix_jobs_claim", "status", "internal", "priority", "id"),
        # A page of a list is read from where its cursor points, in order, with and without a status.
        Index(None, "project_id", "internal", "id"),
        Index(None, "project_id", "internal", "status", "id"),
        Index("ix_jobs_lease", "lease_expires_at", postgresql_where=text("lease_expires_at is not null"),
              sqlite_where=text("lease_expires_at is not null")),
    )  # fmt: skip
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    recipe: Mapped[str] = mapped_column(String(64), index=True)
    recipe_version: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(String(16))
    internal: Mapped[bool] = mapped_column(Boolean, default=False)
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    base_model_id: Mapped[str | None] = mapped_column(Id, index=True)  # the model it starts from
    wait_for_job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)  # whose model it starts from
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    child_key: Mapped[str | None] = mapped_column(String(200))
    retry_of: Mapped[str | None] = mapped_column(Id)
    resume_from: Mapped[str | None] = mapped_column(Id)  # a checkpoint of the job that this one retries

    status: Mapped[str] = mapped_column(String(16), index=True)
    wanted: Mapped[str] = mapped_column(String(8), default="run")
    status_reason: Mapped[str | None] = mapped_column(String(64))
    priority: Mapped[int] = mapped_column(Integer, default=0)
    device: Mapped[str] = mapped_column(String(8), default="auto")
    gpus: Mapped[int] = mapped_column(Integer, default=1)
    spec: Mapped[Json]
    plan: Mapped[Json | None]
    progress: Mapped[Json | None]
    metrics: Mapped[Json] = mapped_column(default=dict)  # the latest value by name
    best: Mapped[Json | None]
    result: Mapped[Json | None]
    error: Mapped[Json | None]
    meta: Mapped[Json] = mapped_column("metadata", default=dict)
    model_id: Mapped[str | None] = mapped_column(Id)
    exact: Mapped[bool] = mapped_column(Boolean, default=True)

    attempt: Mapped[int] = mapped_column(Integer, default=0)
    max_attempts: Mapped[int] = mapped_column(Integer, default=20)
    losses: Mapped[int] = mapped_column(Integer, default=0)  # in a row, without a newer checkpoint
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_expires_at: Mapped[float | None]
    not_before: Mapped[float] = mapped_column(default=0.0)  # back-off
    last_event: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float] = mapped_column(server_default=Now())
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class Attempt(Base):
    """One claim of a job; at most one is open."""

    __tablename__ = "attempts"
    __table_args__ = (
        Index("uq_attempts_open", "job_id", unique=True, postgresql_where=text("closed_at is null"),
              sqlite_where=text("closed_at is null")),
    )  # fmt: skip
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    worker: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(8))  # message or poll
    fingerprint: Mapped[Json | None]
    outcome: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[Json | None]
    opened_at: Mapped[float] = mapped_column(server_default=Now())
    closed_at: Mapped[float | None]


class Event(Base):
    """One numbered line of a job's log; at most one of type `done`."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        Index("uq_events_done", "job_id", unique=True, postgresql_where=text("type = 'done'"),
              sqlite_where=text("type = 'done'")),
    )  # fmt: skip
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    type: Mapped[str] = mapped_column(String(16))
    code: Mapped[str] = mapped_column(String(64))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Json]
    attempt: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[float] = mapped_column(server_default=Now())


class Metric(Base):
    """One number at one step; the newest attempt's word counts. Null is a number that was not finite."""

    __tablename__ = "metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(120), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float | None]
    attempt: Mapped[int] = mapped_column(Integer)


class Checkpoint(Base):
    """The resumable state of a job: one safetensors file."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step", "attempt"),)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int]
    epoch: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[Json]
    best: Mapped[bool] = mapped_column(Boolean, default=False)
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    created_at: Mapped[float] = mapped_column(server_default=Now())


class JobFile(Base):
    """What a run made besides a model."""

    __tablename__ = "job_files"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    media_type: Mapped[str] = mapped_column(String(100))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)


class Model(Base):
    """An immutable trained artefact; the row lives on as a tombstone after it was deleted."""

    __tablename__ = "models"
    __table_args__ = (
        UniqueConstraint("project_id", "name", "version"), UniqueConstraint("job_id"), Index(None, "project_id", "id"),
    )  # fmt: skip
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))  # that trained or imported it
    upload_id: Mapped[str | None] = mapped_column(ForeignKey("uploads.id"))  # of an import
    name: Mapped[str] = mapped_column(String(200))
    version: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String(16))
    task: Mapped[str | None] = mapped_column(String(40))
    config: Mapped[Json | None]  # domain.models.ModelConfig
    parameters: Mapped[int | None]
    metrics: Mapped[Json] = mapped_column(default=dict)
    lineage: Mapped[Json] = mapped_column(default=dict)
    visibility: Mapped[str] = mapped_column(String(8), default="private")
    tags: Mapped[list[Any]] = mapped_column(default=list)
    description: Mapped[str] = mapped_column(Text, default="")
    error: Mapped[Json | None]
    created_at: Mapped[float] = mapped_column(server_default=Now())
    deleted_at: Mapped[float | None]


class ModelFile(Base):
    """One file of a model."""

    __tablename__ = "model_files"
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)


class Worker(Base):
    """A worker process and what it offers."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(200))
    slots: Mapped[int] = mapped_column(Integer)
    busy: Mapped[int] = mapped_column(Integer, default=0)
    gpus: Mapped[list[Any]]  # of {name, memory_bytes}
    versions: Mapped[Json]
    draining: Mapped[bool] = mapped_column(Boolean, default=False)
    started_at: Mapped[float] = mapped_column(server_default=Now())
    heartbeat_at: Mapped[float] = mapped_column(server_default=Now(), index=True)
