"""The shapes of what is answered, for OpenAPI: tests hold real answers against them."""

from __future__ import annotations

import base64
from math import isfinite
from typing import Any, Literal

from pydantic import BaseModel, Field

from stepwell.types import CacheReport, Limits, SamplingParams, Task


class CacheAnswer(BaseModel):
    """What the step cache did: the share of block runs that were computed, which steps ran in full (1) and which did not (0),
    and the change each was decided by."""

    computed_ratio: float
    steps: str
    residuals: list[float | None]


TIMINGS = (
    "Wall-clock milliseconds: `queued`, then each stage of the model by name, then `total`, which has waits between steps too."
)


class Picture(BaseModel):
    """One picture, as `response_format` asks for it."""

    b64_json: str | None
    url: str | None
    revised_prompt: None
    seed: int
    timings_ms: dict[str, float] = Field(description=TIMINGS)
    cache: CacheAnswer | None


class Pictures(BaseModel):
    """OpenAI's ImagesResponse."""

    id: str
    created: int
    data: list[Picture]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: None
    size: str
    usage: None


class Link(BaseModel):
    """Where a file is; relative to this server's root if it has no host."""

    url: str


class VideoProblem(BaseModel):
    """Why a video failed."""

    code: str | None
    message: str | None


class Video(BaseModel):
    """OpenAI's Video, with what diffusion servers add. Times are Unix seconds."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="Percent.")
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    prompt: str
    remixed_from_video_id: str | None
    error: VideoProblem | None
    seed: int
    fps: int
    num_frames: int
    data: list[Link]
    timings_ms: dict[str, float] | None = Field(description=f"{TIMINGS} None until the video is completed.")
    cache: CacheAnswer | None


class VideoPage(BaseModel):
    """A page of videos. The next one begins `after` its `last_id`."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """What is gone."""

    id: str
    object: Literal["video.deleted", "queue.entry.deleted"]
    deleted: Literal[True]


class QueueEntry(BaseModel):
    """A request that waits or runs. `position` counts everybody's requests before it."""

    id: str
    status: Literal["queued", "in_progress"]
    position: int
    eta_s: float | None


class QueueList(BaseModel):
    """This key's requests in order; `length` counts everybody's."""

    object: Literal["list"]
    data: list[QueueEntry]
    length: int


class ModelDescription(BaseModel):
    """A model in the words of SGLang Diffusion."""

    model_path: str
    task_type: Task
    pipeline_name: str
    pipeline_class: str
    num_gpus: int
    dit_precision: str
    vae_precision: str


class ModelDescriptions(ModelDescription):
    """The first model, and then every one that is served."""

    models: list[ModelDescription]


class ModelCard(BaseModel):
    """OpenAI's Model, then what it does by default and at most."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    task_type: Task
    pipeline_name: str
    pipeline_class: str
    num_gpus: int
    dit_precision: str
    vae_precision: str
    supported_task_types: list[Task]
    defaults: SamplingParams
    limits: Limits


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    """All is well."""

    status: Literal["ok"]


class Health(BaseModel):
    """How the server is, and how busy."""

    status: Literal["ok", "draining", "drowsy", "asleep", "waking"] = Field(
        description="drowsy: finishing what is under way before it falls asleep; asleep: without a model until POST /v1/wake."
    )
    queued: int = Field(description="Samples that wait.")
    running: int = Field(description="Samples under way.")
    jobs: int
    restarts: int = Field(description="How often the engine's process was lost.")


class EngineState(BaseModel):
    """Whether the engine has its model."""

    object: Literal["engine"]
    state: Literal["awake", "drowsy", "asleep", "waking"]


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Problem


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def cache_answer(report: CacheReport | None) -> dict[str, Any] | None:
    """A `CacheAnswer`; None where there was no cache."""
    if report is None:
        return None
    return {
        "computed_ratio": round(report.computed_ratio, 4),
        "steps": "".join("01"[computed] for computed in report.computed_steps),
        "residuals": [round(change, 4) if change is not None and isfinite(change) else None for change in report.residuals],
    }
