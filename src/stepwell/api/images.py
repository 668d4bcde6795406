"""The Images API (`POST /v1/images/generations` and `/edits`) as the openai SDK speaks it."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from stepwell.api.answers import as_base64, cache_answer
from stepwell.api.body import Form, Models, SamplingBody, parse_body, parse_form, pick_model, size_of
from stepwell.config.load import shorten
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.media.images import Parameters, encode_image, to_image
from stepwell.types import Done, Frames, ModelInfo, Output, Preview, Progress, Request, replace

PILLOW_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


class ImagesBody(SamplingBody):
    """A request for pictures."""

    n: int | None = Field(None, ge=1, le=10)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP.")
    style: str | None = Field(None, description="No effect.")
    moderation: str | None = Field(None, description="No effect.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    background: Literal["auto", "opaque", "transparent"] | None = None
    progress_events: bool | None = Field(None, description="With stream: an event after every denoising step, too.")


class EditsBody(ImagesBody):
    """The fields of a request for pictures made from a picture. The picture itself is a file, or a URL."""

    input_fidelity: str | None = Field(None, description="No effect.")
    strength: float | None = Field(None, description="How much of the picture is noised away, in (0, 1].")
    url: str | None = Field(None, description="Where the picture is, instead of a file.")


@dataclass(frozen=True, slots=True)
class Answer:
    """How the result is to be written. `ignored` names fields that were given and change nothing."""

    format: str
    quality: int
    by_url: bool
    stream: bool
    partial_images: int
    progress_events: bool
    ignored: tuple[str, ...]

    def encode(self, frames: Frames, parameters: Parameters) -> bytes:
        return encode_image(frames, parameters, PILLOW_FORMATS[self.format], self.quality)


def to_request(body: Any, models: Models) -> tuple[Request, Answer]:
    """A JSON body to a request. Raises InvalidRequest, Unsupported or ModelNotFound, naming the field."""
    return _translate(parse_body(ImagesBody, body), models)


def parse_edit(form: Form) -> EditsBody:
    """The fields of an edit; refuses what no file or field may be."""
    for name in form.fields.keys() & {"image", "image[]"}:
        said = shorten(form.fields[name][0])
        raise InvalidRequest(f"{name} = {said}: must be a file; url takes a picture's URL", param=name)
    parsed = parse_form(EditsBody, form)
    if "mask" in form.files:
        raise Unsupported("mask: this server repaints whole pictures; leave the mask out, or lower strength", param="mask")
    for name in form.files:
        if name not in ("image", "image[]"):
            raise InvalidRequest(f"{name}: unknown file; an edit takes image or image[]", param=name)
    if form.files and parsed.url is not None and ":" not in parsed.url:
        parsed = parsed.model_copy(update={"url": None})  # the file's name, as SGLang's examples send it
    count = sum(len(files) for files in form.files.values()) + (parsed.url is not None)
    if count != 1:
        raise InvalidRequest(f"image: {count} pictures were given; this model starts from exactly one", param="image")
    return parsed


def to_edit_request(parsed: EditsBody, picture: Frames, models: Models) -> tuple[Request, Answer]:
    """An edit to a request."""
    request, answer = _translate(parsed, models)
    return replace(request, image=picture, sampling=replace(request.sampling, strength=parsed.strength)), answer


def _translate(parsed: ImagesBody, models: Models) -> tuple[Request, Answer]:
    model = pick_model(parsed.model, models, "pictures")
    if parsed.background == "transparent":
        raise Unsupported("background = 'transparent': this model paints opaque pictures", param="background")
    if parsed.stream and parsed.response_format == "url":
        raise Unsupported(
            "response_format = 'url' with stream: events carry their pictures; use b64_json", param="response_format"
        )
    for name in ("partial_images", "progress_events"):
        if getattr(parsed, name) and not parsed.stream:
            raise InvalidRequest(f"{name} needs stream = true", param=name)
    format = parsed.output_format or "png"
    ignored = parsed.without_effect()
    if parsed.output_compression is not None and format == "png":
        ignored.append("output_compression")
    answer = Answer(
        format=format,
        quality=95 if parsed.output_compression is None else parsed.output_compression,
        by_url=parsed.response_format == "url",
        stream=bool(parsed.stream),
        partial_images=parsed.partial_images or 0,
        progress_events=bool(parsed.progress_events),
        ignored=tuple(ignored),
    )
    sampling = replace(parsed.sampling(), num_outputs=parsed.n)
    return Request(prompt=parsed.prompt, sampling=sampling, model=model.id), answer


# ------------------------------------------------------------------------------------------------------------- answers
def encoded(request: Request, done: Done, answer: Answer, model: ModelInfo) -> list[bytes]:
    """The finished files."""
    return [answer.encode(output.frames, Parameters.of(request, output, model)) for output in done.outputs]


def to_response(request: Request, done: Done, answer: Answer, contents: list[dict[str, Any]]) -> dict[str, Any]:
    """The result as `ImagesResponse`. `contents` hold b64_json or url of each picture; seeds and timings come along."""
    data = [
        {"b64_json": None, "url": None, "revised_prompt": None, **content, **_about(output)}
        for output, content in zip(done.outputs, contents, strict=True)
    ]
    return {
        "id": request.id,
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": answer.format,
        "quality": None,
        "size": size_of(request),
        "usage": None,
    }


def _about(output: Output) -> dict[str, Any]:
    timings_ms = {name: round(ms, 3) for name, ms in output.timings_ms.items()}
    return {"seed": output.seed, "timings_ms": timings_ms, "cache": cache_answer(output.cache)}


def partial_event(kind: str, request: Request, preview: Preview, answer: Answer, place: int) -> dict[str, Any]:
    """A preview as `image_generation.partial_image` or `image_edit.partial_image`, scaled to the picture's size."""
    sampling, buffer = request.sampling, io.BytesIO()
    assert sampling.width is not None and sampling.height is not None
    picture = to_image(preview.frames).resize((sampling.width, sampling.height))
    picture.save(buffer, PILLOW_FORMATS[answer.format], quality=answer.quality)
    return {
        **_event(f"{kind}.partial_image", request, answer, buffer.getvalue()),
        "partial_image_index": place,
        "index": preview.index,
        "step": preview.step,
    }


def completed_event(kind: str, request: Request, output: Output, answer: Answer, content: bytes) -> dict[str, Any]:
    """A finished picture as `image_generation.completed` or `image_edit.completed`."""
    return {
        **_event(f"{kind}.completed", request, answer, content),
        "usage": None,
        "index": output.index,
        **_about(output),
    }


def progress_event(kind: str, event: Progress) -> dict[str, Any]:
    """A step taken; only for clients that ask for it, since OpenAI's know no such type."""
    return {"type": f"{kind}.progress", "index": event.index, "stage": event.stage, "step": event.step, "total": event.total}


def _event(kind: str, request: Request, answer: Answer, content: bytes) -> dict[str, Any]:
    return {
        "type": kind,
        "b64_json": as_base64(content),
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": answer.format,
        "quality": "auto",
        "size": size_of(request),
    }
