"""A creating call that may bring a file: read, checked, kept and inserted in one way, whatever is made of it."""

from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.deps import BlobsDep, DatabaseDep, IdempotencyKey, SettingsDep, WriteDep
from app.http import multipart
from app.http.envelope import Object
from app.http.idempotency import Once, fingerprint, reserved
from app.store import tables, uploads

Asked = TypeVar("Asked", bound=BaseModel)
Made = TypeVar("Made", bound=Object)
ACCEPTED = 202  # what is made of bytes is checked later, by a worker


class Creation:
    """One such call; `Location` is its path and the new id."""

    def __init__(
        self, request: Request, response: Response, principal: WriteDep, database: DatabaseDep, blobs: BlobsDep,
        settings: SettingsDep, key: IdempotencyKey = None,
    ) -> None:  # fmt: skip
        self.request, self.settings = request, settings
        self.project_id = principal.project_id
        self._response, self._database, self._blobs, self._key = response, database, blobs, key

    @property
    def media_type(self) -> str:
        """What kind of body was sent, without its parameters."""
        return self.request.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def from_form(
        self,
        *,
        known: frozenset[str],
        read: Callable[[dict[str, str]], Asked],
        insert: Callable[[Session, Asked, tables.Upload], Made],
        check: Callable[[Session, Asked], object] | None = None,
    ) -> Made:
        """Make an object of a form with the part `file` and the text fields `known`.

        `read` turns the fields into values, `check` may refuse what they name before any byte is kept, and `insert`
        makes the object in the transaction that also inserts the upload and the stored answer.
        """
        async with (
            reserved(self._database, project_id=self.project_id, route=self._route, key=self._key) as reservation,
            multipart.receive(self.request, self._blobs, self.settings, known=known) as form,
        ):
            asked = read(form.fields)
            asked_print = fingerprint([asked.model_dump(mode="json"), form.file.sha256])
            reservation.compare(asked_print)
            if check is not None:
                await self._database.run(lambda session: check(session, asked), read_only=True)
            await run_in_threadpool(self._blobs.keep, self._database.engine, form.file)

            def work(session: Session) -> Made:
                upload = uploads.insert(session, self.project_id, form.file, form.filename)
                made = insert(session, asked, upload)
                return reservation.answer(
                    session, self._response, made, asked=asked_print, status=ACCEPTED, location=self._at(made)
                )  # fmt: skip

            return await self._database.run(work)

    async def from_json(self, asked: Asked, insert: Callable[[Session, Asked], Made]) -> Made:
        """Make an object of a body that was read and checked."""

        def work(session: Session) -> Made:
            once = Once(
                session, self._response, project_id=self.project_id, route=self._route, key=self._key, status=ACCEPTED
            )  # fmt: skip
            once.begin(asked)
            made = insert(session, asked)
            return once.answer(made, location=self._at(made))

        return await self._database.run(work)

    @property
    def _route(self) -> str:
        return f"{self.request.method} {self.request.url.path}"

    def _at(self, made: Object) -> str:
        return f"{self.request.url.path}/{made.id}"


CreationDep = Annotated[Creation, Depends(Creation)]
