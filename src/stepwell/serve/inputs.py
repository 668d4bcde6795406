"""Reads what clients send: JSON and forms within bounds."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import Request as HttpRequest
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from stepwell.api.body import Form
from stepwell.config.load import shorten
from stepwell.config.schema import ServerOptions
from stepwell.errors import InvalidRequest
from stepwell.media.incoming import Incoming
from stepwell.serve.edges import BodyTooLarge, BodyTooSlow, ClientGone

V = TypeVar("V")
MAX_JSON_BYTES = 4 * 2**20
MAX_FIELDS, MAX_FILES = 100, 16  # of a form
MAX_KEYS = 1024  # of a JSON object: `logit_bias` has one for each token
MAX_DEPTH = 100  # of JSON: what reads it later calls itself for every level
TOO_DEEP = f"the body has more than {MAX_DEPTH} lists and objects within each other"
IDLE_S, BODY_S = 60, 600  # without a byte of the body; for all of it
TAIL_BYTES = 4096  # what a form ends with fits
HELD_IN = "latin-1"  # every byte is a character of it


class UnsupportedMediaType(InvalidRequest):
    """A body of a kind no route reads."""

    status = 415
    code = "unsupported_media_type"

    def __init__(self, kind: str, wanted: str):
        super().__init__(f"content-type {kind[:100]!r}: send {wanted}")


class Inputs:
    """One server's bounds; `pictures` decodes those that come along."""

    def __init__(self, options: ServerOptions):
        self.pictures = Incoming(options)

    async def read_json(self, http: HttpRequest) -> Any:
        """A JSON body."""
        kind = _kind(http)
        if not _is_json(kind):
            raise UnsupportedMediaType(kind, "application/json")
        content = await self._whole(http)
        try:
            body = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_object)
        except RecursionError:
            raise InvalidRequest(TOO_DEEP) from None
        except ValueError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None
        _check_depth(body)
        return body

    async def _whole(self, http: HttpRequest) -> bytes:
        try:
            return b"".join([chunk async for chunk in _Body(http, MAX_JSON_BYTES).request.stream()])
        except ClientDisconnect:
            raise ClientGone from None

    async def read(self, http: HttpRequest) -> Any | Form:
        """A JSON body, or a form."""
        return await (self.read_json(http) if _is_json(_kind(http)) else self.read_form(http, "application/json or "))

    async def read_form(self, http: HttpRequest, others: str = "") -> Form:
        """A form, with its files. `others` are the kinds beside it that a refusal names."""
        kind = _kind(http)
        if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
            raise UnsupportedMediaType(kind, f"{others}multipart/form-data")
        if not kind.startswith("multipart"):
            return _pairs(await self._whole(http))
        # models here start from one picture; a second one is let in to be refused in words
        body = _Body(http, 2 * self.pictures.max_bytes + MAX_JSON_BYTES)
        try:
            async with body.request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_JSON_BYTES) as parsed:
                if not body.is_whole_form():
                    raise InvalidRequest("the form breaks off before its end")
                return await self._take_apart(parsed.multi_items())
        except ClientDisconnect:
            raise ClientGone from None
        except (MultiPartException, ValueError) as error:
            raise InvalidRequest(f"the form can't be read: {error}") from None

    async def _take_apart(self, items: list[tuple[str, UploadFile | str]]) -> Form:
        fields: dict[str, list[str]] = {}
        files: dict[str, list[bytes]] = {}
        for raw, value in items:
            name = _text("a name in the form", raw.encode(HELD_IN))
            if not isinstance(value, str):
                if (value.size or 0) > self.pictures.max_bytes:
                    raise BodyTooLarge(f"{name} has {value.size} bytes: at most {self.pictures.max_bytes}", param=name)
                files.setdefault(name, []).append(await value.read())
            else:
                fields.setdefault(name, []).append(_text(name, value.encode(HELD_IN), name))
        return Form(_tuples(fields), _tuples(files))

    def close(self) -> None:
        self.pictures.close()


def _tuples(lists: dict[str, list[V]]) -> dict[str, tuple[V, ...]]:
    return {name: tuple(values) for name, values in lists.items()}


def _text(what: str, content: bytes, param: str | None = None) -> str:
    """What a form holds as text."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} = {shorten(content)}: not UTF-8", param=param) from None


def _pairs(content: bytes) -> Form:
    """A form of the kind that a URL holds."""
    pairs = [pair.replace(b"+", b" ").partition(b"=") for pair in content.split(b"&") if pair]
    if len(pairs) > MAX_FIELDS:
        raise InvalidRequest(f"the form has {len(pairs)} fields: at most {MAX_FIELDS}")
    fields: dict[str, list[str]] = {}
    for raw, _, value in pairs:
        name = _text("a name in the form", unquote_to_bytes(raw))
        fields.setdefault(name, []).append(_text(name, unquote_to_bytes(value), name))
    return Form(_tuples(fields), {})


def _kind(http: HttpRequest) -> str:
    return http.headers.get("content-type", "application/json").split(";")[0].strip().lower()


def _is_json(kind: str) -> bool:
    return kind == "application/json" or kind.endswith("+json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One object of a body: as in a form, nothing is given twice, and there is an end to the fields."""
    found = dict(pairs)
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"the body has an object of {len(pairs)} fields: at most {MAX_KEYS}")
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise InvalidRequest(f"{twice} is given twice", param=twice)
    return found


def _check_depth(body: object) -> None:
    level = [[body]]
    for _ in range(MAX_DEPTH + 1):
        within = (each for held in level for each in held if isinstance(each, dict | list))
        level = [list(each.values()) if isinstance(each, dict) else each for each in within]
    if level:
        raise InvalidRequest(TOO_DEEP)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _held(http: HttpRequest) -> list[tuple[bytes, bytes]]:
    """The headers, with an encoding that every byte of a form is kept in: the parser would guess at what is no UTF-8."""
    kind = re.sub(r";\s*charset\s*=\s*(\"[^\"]*\"|[^;]*)", "", http.headers.get("content-type", ""), flags=re.IGNORECASE)
    others = [(name, value) for name, value in http.headers.raw if name != b"content-type"]
    return [*others, (b"content-type", f"{kind}; charset={HELD_IN}".encode(HELD_IN))]


class _Body:
    """The body of a request, which may not exceed `most` bytes, nor pause for long; read it through `request`."""

    def __init__(self, http: HttpRequest, most: int):
        declared = http.headers.get("content-length", "0")
        if declared.isdigit() and int(declared[:20]) > most:
            raise BodyTooLarge(f"the body has {declared[:20]} bytes: at most {most}")
        self.request = HttpRequest({**http.scope, "headers": _held(http)}, self._receive)
        self._http, self._most, self._seen, self._tail = http, most, 0, b""
        self._deadline = time.monotonic() + BODY_S

    def is_whole_form(self) -> bool:
        """Whether the last bytes close a multipart form: the parser takes one that breaks off for one with less in it."""
        _, options = parse_options_header(self._http.headers.get("content-type"))
        return b"--%s--" % options.get(b"boundary", b"") in self._tail

    async def _receive(self) -> Message:
        try:
            message = await asyncio.wait_for(self._http.receive(), min(IDLE_S, self._deadline - time.monotonic()))
        except TimeoutError:
            raise BodyTooSlow(f"the body came too slowly: {BODY_S} s for all of it, {IDLE_S} s without a byte") from None
        content = message.get("body", b"")
        self._seen += len(content)
        self._tail = (self._tail + content)[-TAIL_BYTES:]
        if self._seen > self._most:
            raise BodyTooLarge(f"the body is larger than {self._most} bytes")
        return message
