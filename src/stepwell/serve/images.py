"""The routes of the Images API."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from stepwell.api import images
from stepwell.api.answers import Pictures, as_base64
from stepwell.api.body import with_previews
from stepwell.engine.intake import complete
from stepwell.errors import by_code
from stepwell.media.images import Parameters
from stepwell.media.storage import new_key
from stepwell.serve.content import serve_file
from stepwell.serve.docs import CONDITIONS, FORM, JSON, KEYED, Takes, described, file_of
from stepwell.serve.jobs import Job, new_job_id
from stepwell.serve.state import Server, unless_gone
from stepwell.serve.streams import event_stream
from stepwell.types import Done, Event, Failed, Preview, Progress, Queued, Request

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
TAKES = Takes(images.ImagesBody, (JSON,))
TAKES_EDIT = Takes(images.EditsBody, (FORM,), files=("image", "image[]"))
REFUSES = (404, 429, 507)
FILE = file_of("image/png", "image/jpeg", "image/webp")


@dataclass(frozen=True, slots=True)
class Work:
    """One request for pictures, complete, and how its answer is to be written."""

    kind: str  # of stream events: "image_generation" or "image_edit"
    request: Request
    answer: images.Answer
    owner: str


def router(server: Server) -> APIRouter:
    """`/v1/images/…`"""
    routes = APIRouter()

    @routes.post("/v1/images/generations", **described(Pictures, *REFUSES, takes=TAKES, headers=KEYED, streams=True))
    async def generate_images(http: HttpRequest) -> Response:
        body = await server.inputs.read_json(http)
        info = server.ready()
        request, answer = images.to_request(body, server.models)
        work = Work("image_generation", complete(request, info.of(request)), answer, http.state.owner)
        return await _respond(server, http, work, body)

    @routes.post("/v1/images/edits", **described(Pictures, *REFUSES, takes=TAKES_EDIT, headers=KEYED, streams=True))
    async def edit_image(http: HttpRequest) -> Response:
        form = await server.inputs.read_form(http)
        info = server.ready()
        parsed = images.parse_edit(form)
        data = next((file for files in form.files.values() for file in files), None)
        picture = (
            await server.inputs.pictures.picture_at(parsed.url or "", "url")
            if data is None
            else await server.inputs.pictures.picture(data, "image")
        )
        request, answer = images.to_edit_request(parsed, picture, server.models)
        work = Work("image_edit", complete(request, info.of(request)), answer, http.state.owner)
        return await _respond(server, http, work, [form.fields, [hashlib.sha256(data or b"").hexdigest()]])

    @routes.head("/v1/images/{image_id}/content", include_in_schema=False)
    @routes.get("/v1/images/{image_id}/content", **described(FILE, 404, 507, headers=CONDITIONS))
    async def image_content(http: HttpRequest, image_id: str) -> Response:
        job = server.find(image_id, http.state.owner, "image")
        return await serve_file(http, server.files, (job.result or {})["keys"]["image"])

    return routes


async def _respond(server: Server, http: HttpRequest, work: Work, body: Any) -> Response:
    headers = {"x-ignored-params": ", ".join(work.answer.ignored)} if work.answer.ignored else {}
    if work.answer.stream:
        return await event_stream(_stream(server, work), headers)
    result = await server.replays.run(http, body, lambda: _result(server, work), unless_gone)
    return JSONResponse(result, headers=headers)


async def _result(server: Server, work: Work) -> dict[str, Any]:
    """Generate, and write the answer."""
    async with server.following(work.request, work.owner) as events:
        done = await _last(events)
    model = server.ready().of(work.request)
    files = await asyncio.to_thread(images.encoded, work.request, done, work.answer, model)
    if work.answer.by_url:
        contents = [{"url": await _keep(server, work, content)} for content in files]
        return images.to_response(work.request, done, work.answer, contents)
    texts = await asyncio.to_thread(lambda: [{"b64_json": as_base64(content)} for content in files])
    return images.to_response(work.request, done, work.answer, texts)


async def _last(events: AsyncIterator[Event]) -> Done:
    async for event in events:
        if isinstance(event, Failed):
            raise by_code(event.code, event.message, event.param)
        if isinstance(event, Done):
            return event
    raise AssertionError("a request ended without a terminal event")


async def _keep(server: Server, work: Work, content: bytes) -> str:
    """Store a picture under its owner's name; the URL it can be had from."""
    key = new_key("image", SUFFIXES[work.answer.format])
    store, keys = server.jobs.store, {"keys": {"image": key}}
    job = await asyncio.wrap_future(store.create(Job(new_job_id("image"), "image", keys, owner=work.owner)))
    try:
        await server.files.put(key, content)
        await asyncio.wrap_future(store.complete(job.id, keys, time.time() + server.options.media_ttl_seconds))
    except BaseException:  # a storage that fails, or a client that hung up
        server.jobs.drop(job.id)
        raise
    return server.files.url(key) or f"/v1/images/{job.id}/content"


async def _stream(server: Server, work: Work) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. Raises before the first one if the request is refused; later failures are events."""
    request, answer = with_previews(work.request, work.answer.partial_images), work.answer
    sent: dict[int, int] = {}
    async with server.following(request, work.owner) as events:
        async for event in events:
            if isinstance(event, Failed):
                raise by_code(event.code, event.message, event.param)
            if isinstance(event, Preview) and sent.get(event.index, 0) < answer.partial_images:
                place = sent[event.index] = sent.get(event.index, 0) + 1
                yield await asyncio.to_thread(images.partial_event, work.kind, request, event, answer, place - 1)
            elif isinstance(event, Progress) and answer.progress_events:
                yield images.progress_event(work.kind, event)
            elif isinstance(event, Done):
                for output in event.outputs:
                    parameters = Parameters.of(request, output, server.ready().of(request))
                    content = await asyncio.to_thread(answer.encode, output.frames, parameters)
                    yield images.completed_event(work.kind, request, output, answer, content)
            elif isinstance(event, Queued):
                yield {}  # a sign of life: the request is taken in
