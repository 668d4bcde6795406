"""Files out of storage over HTTP: whole, by one range, or not at all if the client has them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse

from stepwell.media.storage import MediaNotFound, content_type
from stepwell.serve.files import Files

CHUNK_BYTES = 2**20


async def serve_file(http: HttpRequest, files: Files, key: str) -> Response:
    """A file by its key. Content under a key never changes, so the key is its tag."""
    try:
        size = await files.size(key)
    except MediaNotFound:
        raise MediaNotFound("the file is gone from the server's storage") from None
    headers = {"etag": f'"{key}"', "accept-ranges": "bytes", "cache-control": "private, max-age=3600"}
    if _names(http.headers.get("if-none-match", ""), headers["etag"]):
        return Response(status_code=304, headers=headers)
    is_head = http.method == "HEAD"  # for which there are no ranges (RFC 9110, 14.2)
    takes_part = not is_head and http.headers.get("if-range", headers["etag"]) == headers["etag"]
    asked = http.headers.get("range") if takes_part else None
    span = _span(asked, size)
    if span is None:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
    start, stop = span
    is_part = asked is not None and (start, stop) != (0, size)
    if is_part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["content-length"] = str(stop - start)
    status = 206 if is_part else 200
    if is_head:
        return Response(None, status, headers, content_type(key))
    return StreamingResponse(_chunks(files, key, start, stop), status, headers, content_type(key))


async def _chunks(files: Files, key: str, start: int, stop: int) -> AsyncIterator[bytes]:
    while start < stop:
        end = min(stop, start + CHUNK_BYTES)
        yield await files.read(key, start, end)
        start = end


def _names(header: str, tag: str) -> bool:
    """Whether an `If-None-Match` header names this tag, weakly compared (RFC 9110, 13.1.2)."""
    return header.strip() == "*" or tag in (item.strip().removeprefix("W/") for item in header.split(","))


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """The first and the last byte but one of a `Range` header: everything if it asks for what is not served, None if it
    can't be satisfied (RFC 9110, 14.1.2). Several ranges are answered with the whole."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header or "", re.ASCII)
    if match is None or not (match[1] or match[2]):
        return 0, size
    if not match[1]:
        last = int(match[2])
        return (max(0, size - last), size) if last else None
    start = int(match[1])
    stop = min(size, int(match[2]) + 1) if match[2] else size
    if match[2] and int(match[2]) < start:
        return 0, size
    return (start, stop) if start < size else None
