"""The Videos API (`/v1/videos`) as the openai SDK speaks it, and the record a video job is run again from."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from stepwell.api.answers import as_base64
from stepwell.api.body import Body, Form, Models, Nvext, SamplingBody, either, parse_body, parse_form, pick_model
from stepwell.errors import InvalidRequest
from stepwell.media.video import preview
from stepwell.types import Frames, ModelInfo, Preview, Request, SamplingParams, replace

MAX_SECONDS = 3600
DECIMAL = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", re.ASCII)


class VideoNvext(Nvext):
    """`nvext` for videos."""

    fps: int | None = None
    num_frames: int | None = None
    guidance_scale_2: float | None = None


class Reference(Body):
    """A picture by URL."""

    image_url: str

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError('must be a picture\'s file in a form, or an object, {"image_url": URL}')
        return value


class VideosBody(SamplingBody):
    """A request for a video."""

    seconds: float | str | None = Field(None, description="Length. num_frames, if given too, decides.")
    input_reference: Reference | None = Field(None, description="The first picture, by URL; as a file in a form.")
    image_reference: Reference | None = Field(None, description="The same as input_reference.")
    response_format: Literal["url"] | None = None
    fps: int | None = None
    num_frames: int | None = None
    guidance_scale_2: float | None = Field(None, description="Guidance of the second transformer, for models that have two.")
    nvext: VideoNvext | None = None


class RemixBody(Body):
    """A new prompt for a video made before; all else stays."""

    prompt: str


def parse_video(body: Any) -> VideosBody:
    parsed = parse_body(VideosBody, body)
    _check_pictures(_references(parsed))
    return parsed


def parse_video_form(form: Form) -> VideosBody:
    """A form's fields; its one file, if any, is the first picture."""
    parsed = parse_form(VideosBody, form)
    for name in form.files:
        if name not in ("input_reference", "image_reference"):
            raise InvalidRequest(f"{name}: unknown file; a video takes input_reference", param=name)
    _check_pictures(sum(len(files) for files in form.files.values()) + _references(parsed))
    return parsed


def _references(parsed: VideosBody) -> int:
    return sum(reference is not None for reference in (parsed.input_reference, parsed.image_reference))


def _check_pictures(count: int) -> None:
    if count > 1:
        raise InvalidRequest(f"input_reference: {count} pictures were given; a video starts from one", param="input_reference")


def reference_url(parsed: VideosBody) -> str | None:
    reference = parsed.input_reference or parsed.image_reference
    return None if reference is None else reference.image_url


def to_request(parsed: VideosBody, picture: Frames | None, models: Models) -> Request:
    """A request, still to be completed. Raises InvalidRequest, Unsupported or ModelNotFound, naming the field."""
    model = pick_model(parsed.model, models, "videos")
    nvext = parsed.nvext or VideoNvext()
    fps = either("fps", parsed.fps, nvext.fps)
    frames = either("num_frames", parsed.num_frames, nvext.num_frames)
    if parsed.seconds is not None:
        wanted = _frames(parsed.seconds, fps or model.defaults.fps or 1, model)
        frames = wanted if frames is None else frames
    second = either("guidance_scale_2", parsed.guidance_scale_2, nvext.guidance_scale_2)
    sampling = replace(parsed.sampling(), num_frames=frames, fps=fps, guidance_scale_2=second, num_outputs=1)
    return Request(prompt=parsed.prompt, sampling=sampling, image=picture, model=model.id)


def _frames(seconds: float | str, fps: object, model: ModelInfo) -> int:
    """The count of frames a model makes that is nearest to a length."""
    length = float(seconds) if not isinstance(seconds, str) or DECIMAL.fullmatch(seconds) else -1.0
    if not 0 < length <= MAX_SECONDS:
        raise InvalidRequest(f"seconds = {seconds!r}: must be a number above 0 and at most {MAX_SECONDS}", param="seconds")
    if isinstance(fps, bool) or not isinstance(fps, int) or not 1 <= fps <= 240:
        raise InvalidRequest(f"fps = {fps!r}: must be an integer between 1 and 240", param="fps")
    limits = model.limits
    frames = 1 + round((length * fps - 1) / limits.frame_multiple) * limits.frame_multiple
    if frames > limits.max_frames:
        most = limits.max_frames / fps
        raise InvalidRequest(
            f"seconds = {seconds}: {length * fps:.0f} frames at {fps} a second; this model makes at most {limits.max_frames} "
            f"({most:g} s)", param="seconds",
        )  # fmt: skip
    return max(1, frames)


def seconds_of(sampling: SamplingParams) -> float:
    """How long a video of complete parameters is."""
    return (sampling.num_frames or 1) / (sampling.fps or 1)


def preview_event(event: Preview, sampling: SamplingParams) -> dict[str, Any]:
    """What a running video looked like after a step: a small animated WebP."""
    content = as_base64(preview(event.frames, seconds_of(sampling)))
    return {"type": "video.preview", "id": event.request_id, "step": event.step, "output_format": "webp", "b64_json": content}


def to_video(job: Any, sampling: SamplingParams, url: str | None) -> dict[str, Any]:
    """A job as OpenAI's `Video`, with what diffusion servers add."""
    error = job.error
    return {
        "id": job.id,
        "object": "video",
        "model": job.request["model"],
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "seconds": f"{seconds_of(sampling):g}",
        "size": f"{sampling.width}x{sampling.height}",
        "prompt": job.request["prompt"],
        "remixed_from_video_id": job.remixed_from,
        "error": None if error is None else {"code": error.get("code"), "message": error.get("message")},
        "seed": sampling.seed,
        "fps": sampling.fps,
        "num_frames": sampling.num_frames,
        "data": [{"url": url}] if url is not None and job.status == "completed" else [],
        "timings_ms": (job.result or {}).get("timings_ms"),
        "cache": (job.result or {}).get("cache"),
    }


def remixed(request: Request, body: Any) -> Request:
    """The request of an earlier video with another prompt."""
    return replace(request, prompt=parse_body(RemixBody, body).prompt)
