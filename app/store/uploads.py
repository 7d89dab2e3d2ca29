"""Raw bytes on their way in; a dataset or a model is made of them."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain.errors import Expired, NotFound
from app.store import tables
from app.store.blobs import Stored
from app.store.clock import Now
from app.store.ids import new_id


def insert(session: Session, project_id: str, stored: Stored, filename: str | None) -> tables.Upload:
    """Insert an upload whose bytes are kept already and of which something is made in this transaction."""
    upload = tables.Upload(
        id=new_id("upl"), project_id=project_id, filename=filename, bytes=stored.bytes, sha256=stored.sha256
    )  # fmt: skip
    session.add(upload)
    session.flush()
    return upload


def take(session: Session, project_id: str, upload_id: str) -> tables.Upload:
    """Find a finished upload of this project to make something of it; from now on it does not expire.

    Raises:
        NotFound: there is none.
        Expired: its time was over.
    """
    row = session.execute(
        select(tables.Upload, Now())
        .where(tables.Upload.id == upload_id, tables.Upload.project_id == project_id)
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFound("There is no such upload in this project.", param="upload")
    upload, now = row[0], row[1]
    if upload.expires_at is not None and upload.expires_at <= now:
        raise Expired("This upload has expired; send the bytes again.", param="upload")
    upload.expires_at = None
    return upload


def drop_unused(session: Session, upload_id: str) -> None:
    """Delete an upload of which nothing is left; its bytes are swept later."""
    users = (
        select(tables.Dataset.id).where(tables.Dataset.upload_id == upload_id),
        select(tables.Model.id).where(tables.Model.upload_id == upload_id),
    )
    if all(session.scalar(query.limit(1)) is None for query in users):
        upload = session.get(tables.Upload, upload_id)
        if upload is not None:
            session.delete(upload)
            session.flush()
