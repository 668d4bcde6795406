"""The routes for whoever runs the server: health, metrics, the queue; and what is served."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from stepwell.api import models
from stepwell.api.answers import Deleted, EngineState, Health, ModelCard, ModelDescriptions, ModelList, QueueList, Status
from stepwell.api.body import Body, SleepBody, WakeBody, find_model, parse_body
from stepwell.engine.api import Queue, QueueReply, Stats, StatsReply
from stepwell.errors import Asleep, StepwellError, Unavailable, Unsupported
from stepwell.serve.docs import JSON, Takes, described, text_of
from stepwell.serve.state import NotFound, Server

B = TypeVar("B", bound=Body)
QUEUE_FRESH_S = 0.25
MISSING = {
    "/v1/set_lora": "LoRA adapters are not in this version",
    "/v1/merge_lora_weights": "LoRA adapters are not in this version",
    "/v1/unmerge_lora_weights": "LoRA adapters are not in this version",
    "/v1/list_loras": "LoRA adapters are not in this version",
    "/v1/images/variations": "variations are not offered; POST /v1/images/edits starts from a picture",
    "/v1/videos/edits": "editing videos is not offered",
    "/v1/videos/extensions": "extending videos is not offered",
    "/v1/videos/characters": "characters are not offered",
}


def router(server: Server) -> APIRouter:
    """Everything that makes nothing."""
    routes = APIRouter()

    @routes.head("/livez", include_in_schema=False)
    @routes.get("/livez", **described(Status))
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", **described(Status))
    async def readyz() -> dict[str, str]:
        server.ready()
        if server.is_draining:
            raise Unavailable("the server is shutting down", retry_after_s=5)
        stats = await server.engine.control(Stats())
        assert isinstance(stats, StatsReply)
        if stats.state != "awake":
            raise Asleep
        return {"status": "ok"}

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", **described(Health))
    async def health() -> dict[str, Any]:
        server.ready()
        stats = await server.engine.control(Stats())
        assert isinstance(stats, StatsReply)
        return {
            "status": "draining" if server.is_draining else "ok" if stats.state == "awake" else stats.state,
            "queued": stats.queued_samples,
            "running": stats.running_samples,
            "jobs": server.jobs.active,
            "restarts": stats.restarts,
        }

    @routes.get("/metrics", **described(text_of("text/plain", "Prometheus metrics")))
    async def metrics() -> Response:
        stats: Any = None
        if server.info is not None:
            with suppress(StepwellError):
                stats = await server.engine.control(Stats())
        return Response(
            server.metrics.render(stats, stats is not None and stats.state == "awake", server.name_of),
            media_type="text/plain; version=1.0.0; charset=utf-8",
        )

    _add_sleep(routes, server)
    _add_queue(routes, server)
    _add_models(routes, server)
    for path, reason in MISSING.items():
        routes.add_api_route(path, _refusing(path, reason), methods=["GET", "POST"], include_in_schema=False)
    return routes


def _add_sleep(routes: APIRouter, server: Server) -> None:
    @routes.post("/v1/sleep", **described(EngineState, takes=Takes(SleepBody, (JSON,), is_required=False)))
    async def sleep(http: HttpRequest) -> dict[str, Any]:
        body = await _said(server, http, SleepBody)
        return {"object": "engine", "state": await server.sleep(abort=body.mode == "abort")}

    @routes.post("/v1/wake", **described(EngineState, takes=Takes(WakeBody, (JSON,), is_required=False)))
    async def wake(http: HttpRequest) -> dict[str, Any]:
        await _said(server, http, WakeBody)
        return {"object": "engine", "state": await server.wake()}


async def _said(server: Server, http: HttpRequest, kind: type[B]) -> B:
    """A body that may be left out. Raises InvalidRequest for what it does not know."""
    has_body = http.headers.get("content-length", "0") != "0" or "transfer-encoding" in http.headers
    return parse_body(kind, await server.inputs.read_json(http) if has_body else {})


def _add_queue(routes: APIRouter, server: Server) -> None:
    @routes.get("/v1/queue", **described(QueueList, 507))
    async def list_queue(http: HttpRequest) -> dict[str, Any]:
        entries = await _entries(server)
        mine = [entry for entry in entries if _owns(server, http.state.owner, entry["id"])]
        return {"object": "list", "data": mine, "length": len(entries)}

    @routes.delete("/v1/queue/{request_id}", **described(Deleted, 404, 507))
    async def cancel(http: HttpRequest, request_id: str) -> dict[str, Any]:
        if not _owns(server, http.state.owner, request_id):
            raise NotFound(f"{request_id[:100]!r}: no such request is waiting or running", param="id")
        if request_id in server.live:
            await server.engine.abort(request_id)
        else:
            await server.jobs.cancel(request_id)
        return {"id": request_id, "object": "queue.entry.deleted", "deleted": True}


def _add_models(routes: APIRouter, server: Server) -> None:
    @routes.get("/models", **described(ModelDescriptions))
    async def describe_models() -> dict[str, Any]:
        server.ready()
        return models.describe(server.models)

    @routes.get("/v1/models", **described(ModelList))
    async def list_models() -> dict[str, Any]:
        server.ready()
        return models.listing(server.models, server.created)

    @routes.get("/v1/models/{name:path}", **described(ModelCard, 404))
    async def retrieve_model(name: str) -> dict[str, Any]:
        server.ready()
        served = find_model(name, server.models)
        return models.card(server.models[served], served, server.created)


def _refusing(path: str, reason: str) -> Any:
    async def refuse() -> JSONResponse:
        raise Unsupported(f"{path}: {reason}")

    return refuse


def _owns(server: Server, owner: str, request_id: str) -> bool:
    if request_id in server.live:
        return server.live[request_id] == owner
    job = server.jobs.store.get(request_id, owner)
    return job is not None and job.status in ("queued", "in_progress")


async def _entries(server: Server) -> list[dict[str, Any]]:
    """Live requests with their place and the seconds until they are expected to end, the engine's pace permitting."""
    server.ready()
    queue = await server.engine.control(Queue())
    assert isinstance(queue, QueueReply)
    rate = queue.tokens_per_s
    return [
        {
            "id": entry.request_id,
            "status": "in_progress" if entry.is_running else "queued",
            "position": place,
            "eta_s": round((entry.tokens_ahead + entry.tokens_left) / rate, 3) if rate else None,
        }
        for place, entry in enumerate(queue.entries)
    ]


async def eta_s(server: Server, request_id: str | None = None) -> float | None:
    """Seconds until a request, or everything in the engine, is expected to be done; None if nobody knows.

    For one request a queue that was seen lately will do, so that many who ask for their own don't burden the engine.
    """
    seen_at, entries = server.queue_seen
    is_fresh = time.monotonic() - seen_at < QUEUE_FRESH_S and any(entry["id"] == request_id for entry in entries)
    if not is_fresh:
        try:
            entries = await _entries(server)
        except StepwellError:
            return None
        server.queue_seen = time.monotonic(), entries
    wanted = [entry["eta_s"] for entry in entries if request_id in (None, entry["id"]) and entry["eta_s"] is not None]
    return max(wanted, default=None)
