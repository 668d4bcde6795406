"""Pictures and videos for Dynamo's frontend: a request's dictionary in, the answer's dictionaries out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from stepwell.api import images, videos
from stepwell.api.answers import as_base64
from stepwell.api.body import Models, find_model, parse_body
from stepwell.dynamo.live import Context, Live
from stepwell.dynamo.requests import PROBE, body_of, folder_of
from stepwell.engine.api import EngineInfo
from stepwell.engine.intake import complete
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.media.images import Parameters, encode_png
from stepwell.media.incoming import Incoming
from stepwell.media.storage import Storage, new_key
from stepwell.media.video import encode_mp4
from stepwell.types import Done, Frames, ModelInfo, Output, Progress, Request, replace

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
FORMATS = ("url", "b64_json")
PROBE_PRIORITY = 1000  # the runtime waits seconds for it, and calls a worker sick that is only busy


class Media:
    """What a worker for pictures or videos does with one request."""

    def __init__(self, live: Live, info: EngineInfo, models: Models, incoming: Incoming, storage: Storage | None):
        self._live, self._info, self._models, self._incoming, self._storage = live, info, models, incoming, storage

    def probe(self) -> dict[str, Any]:
        """A request of one step, the least that shows that the model still computes."""
        name, model = next(iter(self._models.items()))
        limits = model.limits
        side = -(-limits.min_side // limits.multiple) * limits.multiple
        body = {"model": name, "prompt": "a probe", "size": f"{side}x{side}", "response_format": "b64_json"}
        if all(task.takes_image for task in model.tasks):
            gray = encode_png(Frames(b"\x80" * (side * side * 3), 1, side, side))
            body["input_reference"] = f"data:image/png;base64,{as_base64(gray)}"
        extra = {"num_frames": 1} if model.makes == "videos" else {}
        return {**body, "nvext": {"num_inference_steps": limits.min_steps, "seed": 0, **extra}}

    async def answers(self, request: Mapping[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        """Progress, if it was asked for, and the result. Raises StepwellError."""
        body = body_of(request)
        name = find_model(str(body["model"]), self._models) if body.get("model") else next(iter(self._models))
        work = Work(name, body, str(body.get("user") or ""), bool(request.get(PROBE)))
        answers = self._pictures if self._models[name].makes == "pictures" else self._video
        async with aclosing(answers(work, context)) as made:  # type: ignore[type-var]
            async for answer in made:
                yield answer

    async def _pictures(self, work: Work, context: Context) -> AsyncIterator[dict[str, Any]]:
        body = {**work.body, "response_format": self._format(work.body)}
        reference = body.pop("input_reference", None)
        if body.pop("stream", None):
            raise Unsupported("stream: Dynamo's frontend sends pictures whole; leave it out", param="stream")
        if reference is None:
            asked, answer = images.to_request(body, self._models)
        else:
            parsed = parse_body(images.EditsBody, {**body, "url": reference})
            picture = await self._incoming.picture_at(reference, "input_reference")
            asked, answer = images.to_edit_request(parsed, picture, self._models)
        request, model = self._completed(asked, work)
        done = await self._live.done(request, context)
        files = await asyncio.to_thread(images.encoded, request, done, answer, model)
        kept = [await self._kept(file, "image", SUFFIXES[answer.format], work, by_url=answer.by_url) for file in files]
        yield _plain(images.to_response(request, done, answer, kept))

    async def _video(self, work: Work, context: Context) -> AsyncIterator[dict[str, Any]]:
        body = dict(work.body)
        by_url = self._format(body) == "url"
        body.pop("response_format", None)
        format, streams, reference = body.pop("output_format", None), body.pop("stream", None), body.pop("input_reference", None)
        if format not in (None, "mp4"):
            raise Unsupported(f"output_format = {format!r:.100}: videos are made as mp4", param="output_format")
        parsed = videos.parse_video({**body, **({} if reference is None else {"input_reference": {"image_url": reference}})})
        picture = None if reference is None else await self._incoming.picture_at(reference, "input_reference")
        request, model = self._completed(videos.to_request(parsed, picture, self._models), work)
        shown, output = -1, None
        async with aclosing(self._live.events(request, context)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Progress) and streams and shown < int(100 * event.share) < 100:
                    shown = int(100 * event.share)  # a frontend that collects one answer would keep the first one's status
                    yield video_answer(request, work.name, "in_progress", shown)
                elif isinstance(event, Done):
                    output = event.outputs[0]
        assert output is not None
        file = await asyncio.to_thread(_mp4, request, output, model)
        kept = await self._kept(file, "video", "mp4", work, by_url=by_url)
        data = {"output_format": "mp4", "fps": request.sampling.fps, **kept}
        seconds = output.timings_ms["total"] / 1e3
        yield {**video_answer(request, work.name, "completed", 100), "data": [data], "inference_time_s": seconds}

    def _completed(self, asked: Request, work: Work) -> tuple[Request, ModelInfo]:
        request = replace(asked, model=self._models[work.name].id, priority=PROBE_PRIORITY if work.is_probe else 0)
        model = self._info.of(request)
        return complete(request, model), model

    def _format(self, body: Mapping[str, Any]) -> str:
        """url or b64_json; where nobody says, a URL if there is a place for it."""
        format = body.get("response_format")
        if format is None:
            return FORMATS[self._storage is None]
        if format not in FORMATS:
            raise InvalidRequest(f"response_format = {format!r:.100}: must be url or b64_json", param="response_format")
        if format == "url" and self._storage is None:
            raise Unsupported(
                "response_format = 'url': this worker keeps nothing (--media-output-fs-url); use b64_json",
                param="response_format",
            )
        return str(format)

    async def _kept(self, file: bytes, kind: str, suffix: str, work: Work, *, by_url: bool) -> dict[str, Any]:
        """A finished file as the answer holds it."""
        if not by_url or self._storage is None:
            return {"b64_json": await asyncio.to_thread(as_base64, file)}
        return {"url": await asyncio.to_thread(_stored, self._storage, new_key(kind, suffix), file, work.user)}

    def close(self) -> None:
        self._incoming.close()


@dataclass(frozen=True, slots=True)
class Work:
    """One request: the name of its model, its body, who asked, and whether it is only a probe."""

    name: str
    body: dict[str, Any]
    user: str
    is_probe: bool


def video_answer(request: Request, model: str, status: str, progress: int) -> dict[str, Any]:
    """A video as Dynamo's frontend knows it, without its file."""
    about = {"id": request.id, "object": "video", "model": model, "created": int(time.time())}
    return {**about, "status": status, "progress": progress, "data": []}


def _stored(storage: Storage, key: str, file: bytes, user: str) -> str:
    """Store a file, below a folder of its user's if one is named; its URL."""
    place = storage.within("users").within(folder_of(user)) if user else storage
    place.put(key, file)
    return place.url(key) or place.address(key)


def _mp4(request: Request, output: Output, model: ModelInfo) -> bytes:
    return encode_mp4(output.frames, request.sampling.fps or 1, asdict(Parameters.of(request, output, model)))


def _plain(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what is None: the frontend tells pictures by URL from others by which field is there."""
    data = [{name: value for name, value in item.items() if value is not None} for item in answer["data"]]
    return {**{name: value for name, value in answer.items() if value is not None}, "data": data}
