"""The HTTP application: routes over an engine. Bodies are `api`'s business, generation is the engine's."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from stepwell.api import images, models
from stepwell.engine.api import Engine, EngineInfo, Stats
from stepwell.engine.intake import complete
from stepwell.errors import InvalidRequest, ModelNotFound, StepwellError, by_code
from stepwell.types import Done, Failed, Request

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 4 * 2**20
PUBLIC = {"/health"}
MISSING = {
    "/v1/images/edits": "image editing is not in this version",
    "/v1/videos": "video models are not in this version",
    "/v1/chat/completions": "text models are not in this version",
    "/v1/completions": "text models are not in this version",
    "/v1/set_lora": "LoRA adapters are not in this version",
    "/v1/merge_lora_weights": "LoRA adapters are not in this version",
    "/v1/unmerge_lora_weights": "LoRA adapters are not in this version",
    "/v1/list_loras": "LoRA adapters are not in this version",
}


def create_app(engine: Engine, info: EngineInfo, *, served_name: str, api_key: str | None = None) -> FastAPI:
    """The application for a started engine, which it closes when it ends."""
    model, created = info.model, int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    app = FastAPI(title="Stepwell", lifespan=lifespan)
    _add_edges(app, api_key)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        stats = await engine.control(Stats())
        return {"status": "ok", "queued": stats.queued_samples, "running": stats.running_samples}

    @app.get("/models")
    async def describe_model() -> dict[str, Any]:
        return models.describe(model)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return models.listing(model, served_name, created)

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        if name not in (served_name, model.id):
            raise ModelNotFound(f"model = {name!r}: this server serves {served_name!r}", param="model")
        return models.card(model, served_name, created)

    @app.post("/v1/images/generations")
    async def generate_images(http: HttpRequest) -> dict[str, Any]:
        request, answer = images.to_request(await _json(http), model, served_name)
        request = complete(request, model)
        done = await _unless_gone(http, _generate(engine, request))
        return await asyncio.to_thread(images.to_response, request, done, answer, model)

    return app


async def _generate(engine: Engine, request: Request) -> Done:
    async for event in engine.generate(request):
        if isinstance(event, Failed):
            raise by_code(event.code, event.message, event.param)
        if isinstance(event, Done):
            return event
    raise AssertionError("a request ended without a terminal event")


async def _unless_gone(http: HttpRequest, work: Awaitable[Any]) -> Any:
    """Await `work`, but give it up, and with it the generation, once the client has hung up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


class ClientGone(Exception):
    """Nobody is there to read the answer."""


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _json(http: HttpRequest) -> Any:
    chunks, size = [], 0
    try:
        async for chunk in http.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


class BodyTooLarge(InvalidRequest):
    """The request's body exceeds the server's limit."""

    status = 413
    code = "body_too_large"


def _add_edges(app: FastAPI, api_key: str | None) -> None:
    """Errors in OpenAI's shape, request ids on everything, and the key if there is one."""

    @app.middleware("http")
    async def edge(http: HttpRequest, call_next: Callable[[HttpRequest], Awaitable[Response]]) -> Response:
        request_id = http.headers.get("x-request-id") or f"http-{uuid.uuid4().hex[:24]}"
        if api_key is not None and http.url.path not in PUBLIC and not _carries(http, api_key):
            response: Response = _error(
                401, "invalid_request_error", "invalid_api_key", "this server needs its API key as a Bearer token"
            )
        else:
            try:
                response = await call_next(http)
            except Exception:
                logger.exception("request %s failed", request_id)
                response = _error(500, "server_error", "internal_error", "internal error; the server's log has the details")
        response.headers["x-request-id"] = request_id
        return response

    @app.exception_handler(StepwellError)
    async def known(_: HttpRequest, error: StepwellError) -> Response:
        return _error(error.status, error.kind, error.code, error.message, error.param)

    @app.exception_handler(ClientGone)
    async def gone(_: HttpRequest, __: ClientGone) -> Response:
        return Response(status_code=400)

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        path, kind = http.url.path, "invalid_request_error"
        reason = _reason_for_missing(path)
        if reason is not None:
            return _error(400, kind, "unsupported", f"{http.method} {path}: {reason}")
        if error.status_code == 405:
            answer = _error(405, kind, "method_not_allowed", f"{http.method} {path}: this route takes another method")
            answer.headers.update(error.headers or {})
            return answer
        hint = "" if path.startswith("/v1/") else "; an OpenAI client's base_url must end in /v1"
        return _error(error.status_code, kind, "not_found", f"{http.method} {path}: no such route{hint}")


def _reason_for_missing(path: str) -> str | None:
    """Why a route of a later version is not here."""
    if path.startswith("/v1/images/") and path.endswith("/content"):
        return "this server keeps no files; pictures come in the answer, as b64_json"
    return next((why for prefix, why in MISSING.items() if path == prefix or path.startswith(f"{prefix}/")), None)


def _carries(http: HttpRequest, api_key: str) -> bool:
    scheme, _, key = http.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(key.encode("latin-1"), api_key.encode())


def _error(status: int, kind: str, code: str, message: str, param: str | None = None) -> JSONResponse:
    headers = {}
    if status >= 500 and status != 503:
        headers["x-should-retry"] = "false"  # doing the same again would only repeat the damage
    if status in (429, 503):
        headers["retry-after"] = "1"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)
