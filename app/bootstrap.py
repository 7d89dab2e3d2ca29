"""The first key: made by the API itself on one machine, given by the operator in production."""

import os
from pathlib import Path

import structlog
from sqlalchemy import Engine

from app.settings import Settings
from app.store import keys, projects
from app.store.session import transaction

FIRST_PROJECT = "default"
log = structlog.get_logger(__name__)


def ensure_first_key(engine: Engine, settings: Settings) -> None:
    """Make sure that somebody can call the API; safe in several processes at once.

    A given `admin_key` is registered, and replaces the one that was given before. Else, in local mode, if no key works,
    one is made and kept in `<home>/key`, readable by its owner only.
    """
    with transaction(engine) as session:
        project = projects.first(session, FIRST_PROJECT)
        if settings.admin_key is not None:
            keys.register_operator(session, project.id, settings.admin_key.get_secret_value(), "admin_key")
        elif settings.mode == "local" and not keys.any_key(session):
            secret = keys.new_secret()
            keys.insert(session, project_id=project.id, name="first", scopes=keys.SCOPES, secret=secret)
            path = settings.home_path / "key"
            # Before the commit: a key in the database that nobody can read would lock everybody out.
            _write_private(path, secret + "\n")
            log.info("key.made", path=str(path))


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)
