"""Objects for tests, each the least that the tables accept, written with the store's own functions where they exist."""

import hashlib
import secrets
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.domain.errors import Failure
from app.domain.jobs import Actor, Status, Wanted
from app.store import life, tables
from app.store.blobs import Blobs, Stored
from app.store.clock import Now
from app.store.ids import new_id
from app.store.session import transaction


def make_project(session: Session, name: str | None = None) -> tables.Project:
    """Make a project: the wall that keeps one test's objects from another's."""
    project = tables.Project(id=new_id("prj"), name=name or f"project {secrets.token_hex(8)}")
    session.add(project)
    session.flush()
    return project


def make_key(
    session: Session, project: tables.Project, *, scopes: tuple[str, ...] = ("read", "write", "admin"), **columns: Any
) -> tuple[tables.Key, str]:
    """Make a key and give its secret too."""
    secret = "ty_" + secrets.token_urlsafe(32)
    key = tables.Key(
        **{
            "id": new_id("key"), "project_id": project.id, "name": "test", "prefix": secret[:10],
            "sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": list(scopes),
        } | columns
    )  # fmt: skip
    session.add(key)
    session.flush()
    return key, secret


def make_dataset(session: Session, project: tables.Project, *, ready: bool = True, **columns: Any) -> tables.Dataset:
    """Make a dataset row of ten labelled images in two classes; it has no shards."""
    dataset_id = new_id("ds")
    facts = {
        "id": dataset_id, "sha256": "0" * 64, "task": "image_classification", "classes": ["cat", "dog"],
        "splits": {"train": 8, "test": 2}, "features": {"image": "image", "label": "class"},
        "labelled": {"train": 8, "test": 2}, "channels": 3,
        "image_sizes": {"min_height": 32, "max_height": 32, "min_width": 32, "max_width": 32},
    }  # fmt: skip
    made = {
        "status": "ready", "task": "image_classification", "format": "image_folder", "bytes": 1000, "sha256": "0" * 64,
        "samples": 10, "facts": facts, "report": {},
    }  # fmt: skip
    dataset = tables.Dataset(
        **{
            "id": dataset_id, "project_id": project.id, "name": f"dataset {secrets.token_hex(4)}", "version": 1,
            "status": "processing", "on_error": "skip",
        } | (made if ready else {}) | columns
    )  # fmt: skip
    session.add(dataset)
    session.flush()
    return dataset


def make_job(session: Session, project: tables.Project, **columns: Any) -> tables.Job:
    """Make a queued job, by the store's own way in."""
    job = tables.Job(
        **{
            "id": new_id("job"), "project_id": project.id, "name": "test", "recipe": "image_classification",
            "recipe_version": "1", "kind": "finetune", "internal": False, "status": "queued", "wanted": "run",
            "spec": {"recipe": "image_classification"}, "device": "auto", "gpus": 1, "priority": 0, "attempt": 0,
            "max_attempts": 20, "losses": 0, "last_event": 0, "not_before": 0.0,
        } | columns
    )  # fmt: skip
    life.insert(session, job)
    session.flush()
    return job


def bring(session: Session, job: tables.Job, status: Status) -> tables.Job:
    """Bring a queued job into another status, by the moves that lead there."""
    held = (Status.STARTING, Status.RUNNING)
    if status in (Status.PAUSED, Status.CANCELLED):
        wanted = Wanted.PAUSE if status is Status.PAUSED else Wanted.CANCEL
        life.move(session, job, status, actor=Actor.API, wanted=wanted)
    elif status not in (Status.QUEUED, Status.WAITING):
        lease = life.Lease(worker="a test", seconds=60, source="poll")
        life.move(session, job, Status.STARTING, actor=Actor.CLAIM, lease=lease)
        if status is not Status.STARTING:
            life.move(session, job, Status.RUNNING, actor=Actor.WORKER)
        if status not in held:
            failure = Failure(fault="user", code="test", message="It failed.") if status is Status.FAILED else None
            life.move(session, job, status, actor=Actor.WORKER, failure=failure)
    session.flush()
    return job


def make_model(session: Session, project: tables.Project, **columns: Any) -> tables.Model:
    """Make a ready model row of two classes; it has no files."""
    config = {
        "architecture": {"architecture": "resnet18"}, "task": "image_classification", "classes": ["cat", "dog"],
        "head": None, "image_size": 32, "channels": 3, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    model = tables.Model(
        **{
            "id": new_id("mdl"), "project_id": project.id, "name": f"model {secrets.token_hex(4)}", "version": 1,
            "status": "ready", "task": "image_classification", "config": config, "parameters": 11_000_000,
        } | columns
    )  # fmt: skip
    session.add(model)
    session.flush()
    return model


def make_blob(engine: Engine, blobs: Blobs, data: bytes | None = None) -> Stored:
    """Store some bytes, random ones if none are given."""
    sink = blobs.receive()
    sink.write(secrets.token_bytes(64) if data is None else data)
    return blobs.keep(engine, sink.finish())


def publish_catalogue(engine: Engine) -> None:
    """Publish two hand-written recipes and two architectures, as a worker would; harmless to repeat."""
    with transaction(engine) as session:
        for recipe in RECIPES:
            session.merge(tables.Recipe(**recipe, published_at=Now()))
        for name, facts in ARCHITECTURES.items():
            session.merge(tables.Architecture(name=name, facts=facts, published_at=Now()))


def _recipe(name: str, kind: str, summary: str, params: dict[str, Any], **requires: Any) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "version": "1", "summary": summary,
        "tasks": ["image_classification"] if kind == "finetune" else ["image_classification", "unlabelled_images"],
        "schema": {
            "type": "object",
            "properties": {"params": {"type": "object", "properties": params, "additionalProperties": False}},
        },
        "defaults": {"params": {key: value["default"] for key, value in params.items()}},
        "template": {
            "recipe": name, "dataset": "ds_00000000000000000000000000",
            "model": {"architecture": "small_cnn"}, "params": {},
        },
        "requires": {
            "labels": False, "unlabelled": False, "min_samples": 1, "min_batch": 1, "min_classes": 0,
            "architectures": None, "reason": None,
        } | requires,
    }  # fmt: skip


RECIPES = (
    _recipe(
        "image_classification", "finetune", "Train a classifier on labelled images.",
        {"trainable": {"type": "string", "pattern": "^(head|all|gradual|last:[0-9]+)$", "default": "all"}},
        labels=True, min_classes=2,
    ),
    _recipe(
        "autoencoder", "pretrain", "Reconstruct images through a bottleneck.",
        {"noise": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.1}}, architectures=["convolutional"],
    ),
)  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet18": {
        "family": "convolutional", "stages": ["stem", "layer1", "layer2", "layer3", "layer4"], "patch": None,
        "min_image_size": 32, "channels": 3, "parameters": 11_689_512,
        "schema": {"type": "object", "properties": {}, "additionalProperties": False},
    },
    "small_cnn": {
        "family": "convolutional", "stages": ["stem", "stage1", "stage2", "stage3"], "patch": None,
        "min_image_size": 8, "channels": 3, "parameters": 2_000_000,
        "schema": {
            "type": "object", "additionalProperties": False,
            "properties": {"width": {"type": "number", "exclusiveMinimum": 0, "maximum": 8, "default": 1.0}},
        },
    },
}  # fmt: skip
