"""Stored bytes as an answer: ranges, entity tag, digest; streamed in pieces, so no thread is held by a slow reader."""

import base64
import re
from typing import Literal
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from app.domain.errors import Unavailable
from app.store.blobs import Blobs, MissingBlob

BYTES: dict[int | str, dict[str, object]] = {
    200: {"description": "The bytes", "content": {"application/octet-stream": {}}},
    206: {"description": "The asked part of them", "content": {"application/octet-stream": {}}},
    304: {"description": "The caller has them already"},
}


def stored(
    request: Request,
    blobs: Blobs,
    *,
    sha256: str,
    size: int,
    media_type: str,
    name: str,
    disposition: Literal["attachment", "inline"] = "attachment",
) -> Response:
    """Answer with a blob, or the part of it that `Range` asks for (RFC 9110, section 14).

    Several ranges at once and units other than bytes are answered with the whole, as the RFC allows.

    Raises:
        HTTPException: 416, the range lies outside.
        Unavailable: the bytes are not in the store.
    """
    tag = f'"{sha256}"'
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",  # RFC 9530
        "Content-Disposition": f"{disposition}; filename*=utf-8''{quote(name, safe='')}",
    }
    if _matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers={key: headers[key] for key in ("ETag", "Cache-Control")})
    start, end = 0, size
    condition = request.headers.get("if-range")
    part = asked_range(request.headers.get("range"), size) if condition in (None, tag) else None
    if part is not None:
        start, end = part
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    try:
        content = blobs.open(sha256, start, end)
    except MissingBlob as error:
        raise Unavailable("The bytes are not in the store; tell the operator.", code="storage_missing") from error
    status = 200 if part is None else 206
    return StreamingResponse(content, status_code=status, headers=headers, media_type=media_type)


def asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Read a `Range` header as (start, end), end excluded; None is the whole.

    Raises:
        HTTPException: 416, nothing of it lies within `size` bytes.
    """
    found = re.fullmatch(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", header or "")
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(size - int(found[2]), 0), size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None  # not a range at all, by the RFC
    if start >= size or end <= start:
        raise HTTPException(416, headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _matches(header: str | None, tag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in header.split(",")]
