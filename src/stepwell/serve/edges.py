"""What holds for every route: request ids, keys, origins, errors in OpenAI's shape, log lines and metrics."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepwell.config.load import shorten, unknown_name
from stepwell.errors import EngineClosed, InvalidRequest, StepwellError, Unavailable
from stepwell.serve.keys import Keys, is_loopback
from stepwell.serve.metrics import Metrics

logger = logging.getLogger("stepwell.access")
OPEN = frozenset({"/livez"})
AVAILABLE_WHILE_DRAINING = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
LONGEST_RETRY_S = 120  # beyond it OpenAI's clients give up at once
MAX_MESSAGE_CHARS, MAX_PARAM_CHARS = 2000, 200
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class ClientGone(Exception):
    """Nobody is there to read the answer."""


class InvalidKey(StepwellError):
    """No key, or one that is not known."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class ForeignOrigin(StepwellError):
    """A page of another site makes a browser ask, openly or under a name of its own for this machine."""

    status = 403
    kind = "permission_error"
    code = "foreign_origin"


class BodyTooLarge(InvalidRequest):
    """The request's body exceeds the server's limit."""

    status = 413
    code = "body_too_large"


class BodyTooSlow(InvalidRequest):
    """The request's body stopped coming. Not 408: OpenAI's clients would send it again."""

    code = "body_timeout"


class Edge:
    """ASGI middleware around everything. `names_matter` is for servers that only their own machine may ask, without a key: a
    site can have its name lead to this machine, and the browser then takes its pages for the server's own."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, is_draining: Callable[[], bool], names_matter: bool):
        self.app = app
        self.keys = keys
        self.metrics = metrics
        self.is_draining = is_draining
        self.names_matter = names_matter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else f"http-{uuid.uuid4().hex[:24]}"
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["x-request-id"] = request_id
                marked["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._answer(scope, receive, send_marked, lambda: status > 0)
        except Exception:
            logger.exception("%s failed", request_id)
            if status:
                raise  # part of the answer is out; cutting the connection is all that is left to say
            await internal_error()(scope, receive, send_marked)
        finally:
            took_s = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.observe(scope["method"], route, status, took_s)
            path = scope["raw_path"].decode("latin-1")  # as it was sent: decoded, it could end the line and forge the next
            logger.info("%s %s %s %d %.1f ms", request_id, scope["method"], path, status, took_s * 1e3)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, has_begun: Callable[[], bool]) -> None:
        """Let the application answer whoever may ask; known errors become answers."""
        try:
            scope.setdefault("state", {})["owner"] = self._admit(scope, Headers(scope=scope))
            await self.app(scope, receive, send)
        except StepwellError as error:
            await answer(error)(scope, receive, send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if not self.is_draining():
                raise
            if not has_begun():  # the server ends at once: who still waits is told, and the log is spared a traceback
                await answer(EngineClosed("the server was stopped"))(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> str:
        """Who asks. Raises what is to be said to somebody who may not."""
        if scope["path"] in OPEN:
            return ""
        owner = self.keys.owner(headers.get("authorization", ""))
        if owner is None:
            raise InvalidKey("this server needs one of its API keys as a Bearer token")
        host = _host(f"//{headers.get('host', '')}")
        if self.names_matter and host and not is_loopback(re.sub(r":\d*$", "", host).strip("[]")):
            raise ForeignOrigin(
                f"Host {host[:200]!r} is no name of this machine; to be reached by others ask for a key, or say allow_no_key"
            )
        origin = headers.get("origin")
        if origin is not None and _host(origin) != headers.get("host", ""):
            raise ForeignOrigin(f"Origin {origin[:200]!r}: pages of other sites may not use this server")
        if self.is_draining() and scope["method"] not in AVAILABLE_WHILE_DRAINING:
            raise Unavailable("the server is shutting down", retry_after_s=5)
        return owner


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


async def check_query(http: HttpRequest) -> None:
    """Refuse what a route does not ask for in its query, and what is there twice."""
    known = [parameter.alias for parameter in http.scope["route"].dependant.query_params]
    names = [name for name, _ in http.query_params.multi_items()]
    for name in names:
        if name not in known:
            raise unknown_name(name, known, "in the query")
        if names.count(name) > 1:
            raise InvalidRequest(f"{name} is given twice", param=name)


def add_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Errors of `routes`, and of routes that do not exist, in OpenAI's shape."""

    @app.exception_handler(StepwellError)
    async def known(_: HttpRequest, error: StepwellError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def bad_query(_: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        message = f"{name} = {shorten(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        return answer(InvalidRequest(message, param=name))

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        path, kind = http.url.path, "invalid_request_error"
        if error.status_code == 405:
            response = error_response(405, kind, "method_not_allowed", f"{http.method} {path}: this route takes another method")
            fitting = [route for route in routes if route.matches(http.scope)[0] is not Match.NONE]  # Starlette names the first's
            methods = {method for route in fitting for method in getattr(route, "methods", ())}
            response.headers.update({"allow": ", ".join(sorted(methods))} if methods else error.headers or {})
            return response
        if error.status_code == 404:
            hint = "" if path.startswith("/v1/") else "; an OpenAI client's base_url must end in /v1"
            return error_response(404, kind, "not_found", f"{http.method} {path}: no such route{hint}")
        return error_response(error.status_code, kind, "invalid_value", str(error.detail))


def answer(error: StepwellError) -> JSONResponse:
    """An error as a response."""
    response = error_response(error.status, error.kind, error.code, error.message, error.param)
    if error.status in (429, 503):
        wait_s = min(max(error.retry_after_s or 1.0, 0.1), LONGEST_RETRY_S)
        response.headers["retry-after"] = str(math.ceil(wait_s))
        response.headers["retry-after-ms"] = str(math.ceil(wait_s * 1e3))
    elif error.status >= 500:
        response.headers["x-should-retry"] = "false"  # doing the same again would only repeat the damage
    return response


def internal_error() -> JSONResponse:
    response = error_response(500, "server_error", "internal_error", "internal error; the server's log has the details")
    response.headers["x-should-retry"] = "false"
    return response


def error_body(kind: str, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    fault = None if param is None else _shown(param, MAX_PARAM_CHARS)
    return {"error": {"message": _shown(message, MAX_MESSAGE_CHARS), "type": kind, "param": fault, "code": code}}


def _shown(text: str, most: int) -> str:
    """Text that may quote a client, cut short, and without the halves of surrogate pairs, which no answer can hold."""
    text = text if len(text) <= most else f"{text[:most]}…"
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(status: int, kind: str, code: str, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(kind, code, message, param), status_code=status)
