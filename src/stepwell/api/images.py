"""The Images API (`POST /v1/images/generations`) as the openai SDK speaks it."""

from __future__ import annotations

import base64
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stepwell.api.body import parse_body
from stepwell.errors import InvalidRequest, ModelNotFound, Unsupported
from stepwell.media.images import Parameters, encode_image
from stepwell.types import Done, ModelInfo, Request, SamplingParams

PILLOW_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


class Nvext(BaseModel):
    """The `nvext` object of NVIDIA Dynamo's documents; the same names at the top level mean the same."""

    model_config = ConfigDict(extra="forbid")
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None


class ImagesBody(BaseModel):
    """The request body. OpenAI's fields first, then those of diffusion servers."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    model: str | None = None
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    stream: bool | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None

    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    max_sequence_length: int | None = None
    nvext: Nvext | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """How the result is to be written."""

    format: str
    quality: int


def to_request(body: Any, model: ModelInfo, served_name: str) -> tuple[Request, Answer]:
    """A JSON body to a request. Raises InvalidRequest, Unsupported or ModelNotFound, naming the field."""
    parsed = parse_body(ImagesBody, body)
    check_model(parsed.model, model, served_name)
    if parsed.response_format == "url":
        raise Unsupported("response_format = 'url': this server keeps no files; use 'b64_json'", param="response_format")
    if parsed.stream:
        raise Unsupported("stream = true: partial images are not in this version", param="stream")
    if parsed.background == "transparent":
        raise Unsupported("background = 'transparent': this model paints opaque pictures", param="background")
    width, height = _size(parsed)
    nvext = parsed.nvext or Nvext()
    sampling = SamplingParams(
        width=width,
        height=height,
        num_inference_steps=_either("num_inference_steps", parsed.num_inference_steps, nvext.num_inference_steps),
        guidance_scale=_either("guidance_scale", parsed.guidance_scale, nvext.guidance_scale),
        true_cfg_scale=parsed.true_cfg_scale,
        negative_prompt=_either("negative_prompt", parsed.negative_prompt, nvext.negative_prompt),
        seed=_either("seed", parsed.seed, nvext.seed),
        num_outputs=parsed.n,
        max_sequence_length=parsed.max_sequence_length,
    )
    return Request(prompt=parsed.prompt, sampling=sampling), Answer(
        parsed.output_format or "png", 95 if parsed.output_compression is None else parsed.output_compression
    )


def to_response(request: Request, done: Done, answer: Answer, model: ModelInfo) -> dict[str, Any]:
    """The result as `ImagesResponse`; every picture also tells its seed and timings."""
    data = []
    for output in done.outputs:
        parameters = Parameters.of(request, output, model)
        content = encode_image(output.frames, parameters, PILLOW_FORMATS[answer.format], answer.quality)
        data.append(
            {
                "b64_json": base64.b64encode(content).decode("ascii"),
                "revised_prompt": None,
                "seed": output.seed,
                "timings_ms": {name: round(ms, 3) for name, ms in output.timings_ms.items()},
            }
        )
    s = request.sampling
    return {
        "id": request.id,
        "created": int(time.time()),
        "data": data,
        "output_format": answer.format,
        "size": f"{s.width}x{s.height}",
    }


def check_model(asked: str | None, model: ModelInfo, served_name: str) -> None:
    """Refuse a request for a model that is not served here."""
    if asked is not None and asked not in (served_name, model.id):
        raise ModelNotFound(f"model = {asked!r}: this server serves {served_name!r}", param="model")


def _size(body: ImagesBody) -> tuple[int | None, int | None]:
    if body.size is None or body.size == "auto":
        return body.width, body.height
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", body.size)
    if match is None:
        raise InvalidRequest(
            f"size = {body.size!r}: must be 'WIDTHxHEIGHT' in pixels, such as '1024x768', or 'auto'", param="size"
        )
    width, height = int(match[1]), int(match[2])
    for name, value, other in (("width", width, body.width), ("height", height, body.height)):
        if other is not None and other != value:
            raise InvalidRequest(f"{name} = {other} contradicts size = {body.size!r}; give one of them", param=name)
    return width, height


def _either(name: str, top: Any, nested: Any) -> Any:
    if top is not None and nested is not None and top != nested:
        raise InvalidRequest(f"{name} = {top!r} contradicts nvext.{name} = {nested!r}; give one of them", param=name)
    return nested if top is None else top
