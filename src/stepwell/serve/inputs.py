"""Reads what clients send: JSON and forms within bounds, pictures decoded where they can do no harm."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request as HttpRequest
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from stepwell.api.body import Form
from stepwell.config.schema import ServerOptions
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.media.fetch import FetchPolicy, read_url
from stepwell.media.uploads import PictureDecoder, UploadLimits
from stepwell.serve.edges import BodyTooLarge, ClientGone
from stepwell.types import Frames

MAX_JSON_BYTES = 4 * 2**20
MAX_FIELDS, MAX_FILES = 100, 16
IDLE_S = 60  # without a byte of the body


class UnsupportedMediaType(InvalidRequest):
    """A body of a kind no route reads."""

    status = 415
    code = "unsupported_media_type"


class Inputs:
    """One server's bounds, and its decoder."""

    def __init__(self, options: ServerOptions):
        self._max_bytes = options.max_upload_mb * 2**20
        self._decoder = PictureDecoder(
            UploadLimits(max_bytes=self._max_bytes, max_pixels=int(options.max_input_megapixels * 1e6))
        )
        self._policy = FetchPolicy(allowed_hosts=tuple(options.url_input_hosts), max_bytes=self._max_bytes)
        self._allows_urls = options.allow_url_inputs

    async def read_json(self, http: HttpRequest) -> Any:
        """A JSON body."""
        chunks = []
        bounded = _bounded(http, MAX_JSON_BYTES)
        try:
            async for chunk in bounded.stream():
                chunks.append(chunk)
        except ClientDisconnect:
            raise ClientGone from None
        try:
            return json.loads(b"".join(chunks), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None

    async def read(self, http: HttpRequest) -> Any | Form:
        """A JSON body, or a form."""
        kind = http.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind == "application/json" or kind.endswith("+json"):
            return await self.read_json(http)
        if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
            raise UnsupportedMediaType(f"content-type {kind[:100]!r}: send application/json or multipart/form-data")
        bounded = _bounded(http, MAX_FILES * self._max_bytes if kind.startswith("multipart") else MAX_JSON_BYTES)
        try:
            async with bounded.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_JSON_BYTES) as parsed:
                return await self._take_apart(parsed.multi_items())
        except ClientDisconnect:
            raise ClientGone from None
        except (MultiPartException, ValueError) as error:
            raise InvalidRequest(f"the form can't be read: {error}") from None

    async def _take_apart(self, items: list[tuple[str, UploadFile | str]]) -> Form:
        fields: dict[str, str] = {}
        files: dict[str, list[bytes]] = {}
        for name, value in items:
            if not isinstance(value, str):
                if (value.size or 0) > self._max_bytes:
                    raise BodyTooLarge(f"{name} has {value.size} bytes: at most {self._max_bytes}", param=name)
                files.setdefault(name, []).append(await value.read())
            elif name in fields:
                raise InvalidRequest(f"{name} is given twice", param=name)
            else:
                fields[name] = value
        return Form(fields, {name: tuple(contents) for name, contents in files.items()})

    async def picture(self, data: bytes, name: str) -> Frames:
        """A picture's file as one RGB frame, upright, without metadata."""
        decoded = await asyncio.to_thread(self._decoder.decode, data, name)
        return Frames(decoded.data, 1, decoded.height, decoded.width)

    async def picture_at(self, url: str, name: str) -> Frames:
        """The picture at a client's URL: data: always, others where the server's operator allows it."""
        if not self._allows_urls and not url[:5].lower() == "data:":
            raise Unsupported(
                f"{name}: fetching URLs is off on this server; send the picture as a file, or as a data: URL", param=name
            )
        return await self.picture(await asyncio.to_thread(read_url, url, self._policy, name), name)

    def close(self) -> None:
        self._decoder.close()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _bounded(http: HttpRequest, most: int) -> HttpRequest:
    """The same request, whose body may not exceed `most` bytes, nor pause for long."""
    declared = http.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > most:
        raise BodyTooLarge(f"the body has {declared[:20]} bytes: at most {most}")
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        try:
            message = await asyncio.wait_for(http.receive(), IDLE_S)
        except TimeoutError:
            raise ClientGone from None
        seen += len(message.get("body", b""))
        if seen > most:
            raise BodyTooLarge(f"the body is larger than {most} bytes")
        return message

    return HttpRequest(http.scope, receive)
