"""The routes of the Videos API. Every video is a job; see `serve.runner`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from stepwell.api import videos
from stepwell.api.answers import Deleted, Video, VideoPage
from stepwell.api.body import Form
from stepwell.engine.intake import complete
from stepwell.errors import InvalidRequest, QueueFull, StepwellError, Unavailable
from stepwell.media.images import encode_png
from stepwell.media.storage import new_key
from stepwell.serve.content import serve_file
from stepwell.serve.docs import CONDITIONS, FORM, JSON, KEYED, Takes, described, events_of, file_of
from stepwell.serve.jobs import Idempotency, Job, new_job_id
from stepwell.serve.operations import eta_s
from stepwell.serve.records import sampling_of, to_record, to_request
from stepwell.serve.replays import body_hash
from stepwell.serve.state import NotFound, Server
from stepwell.serve.streams import event_stream
from stepwell.types import Frames, Preview, Request

KEEP_KEY_S = 86400  # how long an Idempotency-Key stands for its job
RETRY_WINDOW_S = 120  # how long after a job a client's automatic retry of the same body means that job
MAX_LIST = 100
POLL_S = 0.2
TAKES = Takes(videos.VideosBody, (FORM, JSON), files=("input_reference",))
TAKES_REMIX = Takes(videos.RemixBody, (JSON,))
FILE = file_of("video/mp4", "image/webp", "image/jpeg")
PROGRESS = events_of("The video whenever its progress changes, until it has ended; with `previews`, small animated WebPs too")


class NotReady(InvalidRequest):
    """The video has no content yet, or never will."""

    code = "not_ready"


def router(server: Server) -> APIRouter:
    """`/v1/videos…`"""
    routes = APIRouter()

    @routes.post("/v1/videos", **described(Video, 404, 429, 507, takes=TAKES, headers=KEYED))
    async def create_video(http: HttpRequest) -> Response:
        body = await server.inputs.read(http)
        info = server.ready()
        parsed = videos.parse_video_form(body) if isinstance(body, Form) else videos.parse_video(body)
        file = next((file for files in body.files.values() for file in files), None) if isinstance(body, Form) else None
        picture = await _picture(server, parsed, file)
        asked = videos.to_request(parsed, picture, server.models)
        request = complete(asked, info.of(asked))
        said = [body.fields, hashlib.sha256(file or b"").hexdigest()] if isinstance(body, Form) else body
        job = await _create(server, http, request, body_hash(said))
        return await _answer(server, job, tuple(parsed.without_effect()))

    @routes.get("/v1/videos", **described(VideoPage, 507))
    async def list_videos(
        http: HttpRequest,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        jobs, has_more = server.jobs.store.list("video", http.state.owner, after, limit, order)
        data = [_to_video(server, job) for job in jobs]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, **ends, "has_more": has_more}

    @routes.get("/v1/videos/{video_id}", **described(Video, 404, 507))
    async def retrieve_video(http: HttpRequest, video_id: str) -> Response:
        return await _answer(server, server.find(video_id, http.state.owner, "video"))

    @routes.delete("/v1/videos/{video_id}", **described(Deleted, 404, 507))
    async def delete_video(http: HttpRequest, video_id: str) -> dict[str, Any]:
        server.find(video_id, http.state.owner, "video")
        await server.jobs.delete(video_id, http.state.owner)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    _add_content(routes, server)
    return routes


def _add_content(routes: APIRouter, server: Server) -> None:
    """The routes below one video."""

    @routes.head("/v1/videos/{video_id}/content", include_in_schema=False)
    @routes.get("/v1/videos/{video_id}/content", **described(FILE, 404, 507, headers=CONDITIONS))
    async def video_content(
        http: HttpRequest, video_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> Response:
        job = server.find(video_id, http.state.owner, "video")
        if job.status != "completed" or job.result is None:
            raise NotReady(f"the video is {job.status}; it has content once it is completed", param="id")
        return await serve_file(http, server.files, job.result["keys"][variant])

    @routes.post(
        "/v1/videos/{video_id}/remix",
        **described(Video, 404, 429, 507, takes=TAKES_REMIX, headers=KEYED),
    )
    async def remix_video(http: HttpRequest, video_id: str) -> Response:
        body = await server.inputs.read_json(http)
        source = server.find(video_id, http.state.owner, "video")
        info = server.ready()
        image = await server.jobs.image_of(source)
        asked = videos.remixed(to_request(source, server.models, image), body)
        request = complete(asked, info.of(asked))
        job = await _create(server, http, request, body_hash([video_id, body]), remixed_from=video_id)
        return await _answer(server, job)

    @routes.get("/v1/videos/{video_id}/events", **described(PROGRESS, 404, 507))
    async def video_events(http: HttpRequest, video_id: str, previews: bool = False) -> Response:
        server.find(video_id, http.state.owner, "video")
        return await event_stream(_progress(server, video_id, http.state.owner, previews=previews), {})


async def _picture(server: Server, parsed: videos.VideosBody, file: bytes | None) -> Frames | None:
    if file is not None:
        return await server.inputs.pictures.picture(file, "input_reference")
    url = videos.reference_url(parsed)
    return None if url is None else await server.inputs.pictures.picture_at(url, "input_reference")


async def _create(server: Server, http: HttpRequest, request: Request, digest: str, remixed_from: str | None = None) -> Job:
    """One job for one wish, however often a client sends it."""
    owner, given = http.state.owner, http.headers.get("idempotency-key") or None
    if given is None and http.headers.get("x-stainless-retry-count", "0") != "0":
        recent, _ = server.jobs.store.list("video", owner, limit=MAX_LIST)
        for job in recent:
            if job.request.get("body_hash") == digest and time.time() - job.created_at < RETRY_WINDOW_S:
                return job
    claim = None if given is None else Idempotency(owner, given, digest, KEEP_KEY_S)
    if claim is not None and (known := server.jobs.store.made_for(claim)) is not None:
        return known
    await _check_room(server)
    job_id = new_job_id("video")
    with server.jobs.coming(job_id):  # between the check and this nothing else may run
        image_key = None
        if request.image is not None:
            image_key = new_key("input", "png")
            content = await asyncio.to_thread(encode_png, request.image)
            await server.files.put(image_key, content)
        record = to_record(request, server.name_of(request.model), image_key, digest)
        job = Job(job_id, "video", record, owner=owner, remixed_from=remixed_from)
        try:
            made = await server.jobs.create(job, claim)
        except StepwellError:
            await _drop(server, image_key)
            raise
    if made.id != job.id:  # an earlier request made the job, and stored a picture of its own
        await _drop(server, image_key)
    return made


async def _drop(server: Server, key: str | None) -> None:
    if key is not None:
        await server.files.delete(key)


async def _check_room(server: Server) -> None:
    """The engine bounds its queue; a job must not be taken in only to wait outside it."""
    most_s = server.engine_options.max_queue_seconds
    if most_s is not None and (wait_s := await eta_s(server)) is not None and wait_s > most_s:
        raise QueueFull(
            f"about {wait_s:.0f} s of work are waiting, and the queue takes {most_s:g} s", retry_after_s=wait_s - most_s
        )
    most = server.engine_options.max_queued_samples
    if server.jobs.active >= most:  # last, as asking for the time lets others in
        wait_s = await eta_s(server)
        raise QueueFull(
            f"{server.jobs.active} jobs are waiting, and the queue holds {most}; try again later", retry_after_s=wait_s
        )


async def _answer(server: Server, job: Job, ignored: tuple[str, ...] = ()) -> Response:
    headers = {"x-ignored-params": ", ".join(ignored)} if ignored else {}
    if job.status in ("queued", "in_progress"):
        wait_s = await eta_s(server, job.id) or 1.0
        headers["openai-poll-after-ms"] = str(int(min(max(wait_s * 100, 500), 5000)))  # a tenth of what is left
    return JSONResponse(_to_video(server, job), headers=headers)


def _to_video(server: Server, job: Job) -> dict[str, Any]:
    key = (job.result or {}).get("keys", {}).get("video")
    url = None if key is None else server.files.url(key) or f"/v1/videos/{job.id}/content"
    return videos.to_video(job, sampling_of(job), url)


async def _progress(server: Server, video_id: str, owner: str, *, previews: bool) -> AsyncIterator[dict[str, Any]]:
    """The video whenever its progress changes, until it has ended; between, if wanted, the latest preview."""
    last: tuple[str, int] | None = None
    shown: Preview | None = None
    while True:
        job = server.jobs.store.get(video_id, owner)
        if job is None:
            raise NotFound(f"{video_id!r} was deleted", param="id")
        if last != (job.status, job.progress):
            last = job.status, job.progress
            yield {"type": f"video.{job.status}", **_to_video(server, job)}
        if job.status in ("completed", "failed"):
            return
        latest = server.jobs.previews.get(video_id)
        if previews and latest is not None and latest is not shown:
            shown = latest
            yield await asyncio.to_thread(videos.preview_event, latest, sampling_of(job))
        if server.jobs.leaves(video_id):
            raise Unavailable("the server is shutting down; the video will be made once it is back", retry_after_s=5)
        await asyncio.sleep(POLL_S)
