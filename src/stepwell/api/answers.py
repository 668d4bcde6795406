"""The shapes of what is answered, for OpenAPI: tests hold real answers against them."""

from __future__ import annotations

import base64
from math import isfinite
from typing import Any, Literal

from pydantic import BaseModel, Field

from stepwell.types import CacheReport, Limits, SamplingParams, Task, TextInfo


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


class CachedTokens(BaseModel):
    """Tokens of prompts whose keys and values were there already."""

    cached_tokens: int


class PredictedTokens(BaseModel):
    """Tokens of the prediction that are in the text, and that are not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class TextUsageAnswer(BaseModel):
    """OpenAI's usage; then the forwards that texts took part in, how many of them refined nothing, and how often a token that
    was set became another."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictedTokens
    forwards: int
    commits: int
    edits: int
    tokens_per_forward: float


class CalledFunctionAnswer(BaseModel):
    """A function with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallAnswer(BaseModel):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] | None = None


class Likely(BaseModel):
    """A token and its log-probability; bytes are None where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class Told(Likely):
    """A token of the text, the refinement of its block that set it, and the likeliest others then."""

    top_logprobs: list[Likely]
    commit_step: int


class ChatLogprobs(BaseModel):
    """What each token was set by: no left-to-right likelihood, as later tokens of its block may have been there."""

    content: list[Told]
    refusal: None


class CompletionLogprobs(BaseModel):
    """The same, as lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text, with the seed that repeats it."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    seed: int
    timings_ms: dict[str, float] = Field(description=TIMINGS)


class ChatChoice(TextChoice):
    """One answer."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(TextChoice):
    """One text that continues a prompt."""

    text: str
    logprobs: CompletionLogprobs | None


class Texts(BaseModel):
    """What answers with texts have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: TextUsageAnswer


class ChatCompletion(Texts):
    """OpenAI's ChatCompletion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(Texts):
    """OpenAI's Completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


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
    text: TextInfo | None = Field(description="Of a text model: lengths in tokens, and how blocks are filled by default.")


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
