"""A form with one file, parsed as a stream straight to storage: constant memory, nothing spooled, nothing left behind.

python-multipart's push parser cuts the body into parts; the file's bytes go in pieces of 1 MiB to a thread that hashes
and writes them while the next piece arrives.
"""

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from app.domain.errors import ApiError, Detail, Invalid, Malformed, TooLarge, Unavailable
from app.settings import Settings
from app.store.blobs import Blobs, Sink, Stored

PIECE = 2**20
_CHECK_SPACE_EVERY = 64 * 2**20
_MAX_FIELD_BYTES = 64 * 2**10
_MAX_PARTS = 32
FILE = "file"


@dataclass(frozen=True)
class Form:
    """What was sent: text fields by name, and the file, complete and synced but not kept yet."""

    fields: dict[str, str]
    file: Stored
    filename: str | None


class NoSpace(Unavailable):
    """The server's disk is nearly full, so it takes no uploads; ask its operator to free some space."""

    code = "insufficient_storage"


@asynccontextmanager
async def receive(
    request: Request, blobs: Blobs, settings: Settings, *, known: frozenset[str]
) -> AsyncIterator[Form]:  # fmt: skip
    """Read the whole form; what of it is not kept when the block ends, for whatever reason, is removed.

    `known` names the text fields; the part `file` may come before or after them.

    Raises:
        Malformed: the body is cut off or is no multipart form.
        Invalid: a part is unknown, missing, or there twice.
        TooLarge, NoSpace: the file does not fit.
    """
    sink = await run_in_threadpool(blobs.receive)
    try:
        yield await _read(request, sink, settings, known)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace() from error
        raise
    finally:
        # Shielded: the cleaning must be done even if the server is stopping.
        await asyncio.shield(asyncio.to_thread(sink.abort))


async def _read(request: Request, sink: Sink, settings: Settings, known: frozenset[str]) -> Form:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Malformed("Send `Content-Type: multipart/form-data; boundary=…`.")
    declared = request.headers.get("content-length", "0")
    _check_space(settings, int(declared) if declared.isdecimal() else 0)
    parts = _Parts(boundary, known)
    pipe = _Pipe(sink, settings)
    try:
        async for chunk in request.stream():
            parts.feed(chunk)
            await pipe.take(parts.file_pieces)
        await pipe.end()
    finally:
        await pipe.settle()
    if not parts.ended:
        raise Malformed("The body was cut off: its last boundary is missing.")
    if not parts.has_file:
        raise Invalid(
            "file: Send the data as the part `file`.", param=FILE,
            details=[Detail(pointer="/file", message="This part is required.")],
        )  # fmt: skip
    return Form(parts.fields(), await run_in_threadpool(sink.finish), parts.filename)


def _check_space(settings: Settings, needed: int) -> None:
    if shutil.disk_usage(settings.home_path).free - needed < settings.free_space_floor_bytes:
        raise NoSpace()


class _Pipe:
    """Collects pieces of 1 MiB and writes one in a thread while the next one is collected."""

    def __init__(self, sink: Sink, settings: Settings) -> None:
        self._sink, self._settings = sink, settings
        self._collected: list[bytes] = []
        self._size = 0
        self._total = 0
        self._checked = 0
        self._writing: asyncio.Task[None] | None = None

    async def take(self, pieces: list[bytes]) -> None:
        """Take the pieces out of the list."""
        for piece in pieces:
            self._size += len(piece)
            self._total += len(piece)
        self._collected += pieces
        pieces.clear()
        if self._total > self._settings.max_upload_bytes:
            raise TooLarge(f"The file has more than {self._settings.max_upload_bytes} bytes.", param=FILE)
        if self._total - self._checked > _CHECK_SPACE_EVERY:
            self._checked = self._total
            _check_space(self._settings, 0)
        if self._size >= PIECE:
            await self._write()

    async def end(self) -> None:
        """Write the rest."""
        await self._write()
        if self._writing is not None:
            await self._writing

    async def settle(self) -> None:
        """Wait until no thread writes any more, whatever became of it."""
        if self._writing is not None:
            with suppress(Exception):
                await asyncio.shield(self._writing)

    async def _write(self) -> None:
        if self._writing is not None:
            await self._writing
        data = b"".join(self._collected)
        self._collected.clear()
        self._size = 0
        self._writing = asyncio.create_task(asyncio.to_thread(self._sink.write, data)) if data else None


class _Parts:
    """The parts of the form, as the push parser announces them."""

    def __init__(self, boundary: bytes, known: frozenset[str]) -> None:
        self.file_pieces: list[bytes] = []
        self.has_file = self.ended = False
        self.filename: str | None = None
        self._known = known
        self._values: dict[str, bytearray] = {}
        self._headers: dict[bytes, bytes] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._into: Callable[[bytes], None] | None = None
        self._count = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise Malformed(f"The form cannot be read: {error}.") from error

    def feed(self, chunk: bytes) -> None:
        """Parse more bytes."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise Malformed(f"The form cannot be read: {error}.") from error

    def fields(self) -> dict[str, str]:
        """Give the text fields."""
        texts: dict[str, str] = {}
        for name, value in self._values.items():
            try:
                texts[name] = value.decode()
            except UnicodeDecodeError as error:
                raise _about(name, "Send UTF-8 text.") from error
            if "\x00" in texts[name]:
                raise _about(name, "Take NUL characters out of the text.")
        return texts

    def _on_part_begin(self) -> None:
        self._count += 1
        if self._count > _MAX_PARTS:
            raise Malformed(f"The form has more than {_MAX_PARTS} parts.")
        self._headers.clear()

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise Malformed("A part of the form has no name in its Content-Disposition.")
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
            raise _about(name, "Send the bytes as they are, without Content-Transfer-Encoding.")
        if name == FILE:
            if self.has_file:
                raise _about(name, "Send one file; put several into one archive.")
            self.has_file = True
            given = options.get(b"filename", b"").decode("utf-8", "replace").replace("\x00", "")
            self.filename = PurePath(given).name[:200] or None
            self._into = self.file_pieces.append
        elif name not in self._known:
            raise _about(name, f"Unknown part; known are {', '.join(sorted(self._known | {FILE}))}.")
        elif name in self._values:
            raise _about(name, "This part is there twice.")
        else:
            self._into = self._field_into(name)

    def _field_into(self, name: str) -> Callable[[bytes], None]:
        value = self._values[name] = bytearray()

        def extend(data: bytes) -> None:
            value.extend(data)
            if len(value) > _MAX_FIELD_BYTES:
                raise _about(name, f"Send at most {_MAX_FIELD_BYTES} bytes.")

        return extend

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._into is not None:
            self._into(data[start:end])

    def _on_end(self) -> None:
        self.ended = True


def _about(name: str, message: str) -> ApiError:
    return Invalid(f"{name}: {message}", param=name, details=[Detail(pointer=f"/{name}", message=message)])
