"""The nouns every layer shares: what is asked for, what a model can do, what comes back. Standard library only."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

__all__ = [
    "CacheParams",
    "CacheReport",
    "Chunk",
    "DiffusionParams",
    "Done",
    "Event",
    "Failed",
    "Frames",
    "Limits",
    "ModelInfo",
    "Output",
    "Preview",
    "Progress",
    "Queued",
    "Request",
    "SamplingParams",
    "SchedulingPolicy",
    "Task",
    "TextInfo",
    "TextParams",
    "TextPreview",
    "TextResult",
    "TextUsage",
    "TokenInfo",
    "new_request_id",
    "replace",
    "skipped_steps",
]

SchedulingPolicy = Literal["shortest", "fifo"]  # what `engine.scheduler` orders samples by


class Task(StrEnum):
    """What a request asks a model to do; the values are those of `GET /models`."""

    TEXT_TO_IMAGE = "T2I"
    IMAGE_TO_IMAGE = "I2I"
    TEXT_TO_VIDEO = "T2V"
    IMAGE_TO_VIDEO = "I2V"
    TEXT_TO_TEXT = "T2T"

    @property
    def makes_video(self) -> bool:
        return self in (Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO)

    @property
    def takes_image(self) -> bool:
        return self in (Task.IMAGE_TO_IMAGE, Task.IMAGE_TO_VIDEO)


@dataclass(frozen=True, slots=True)
class CacheParams:
    """How denoising steps reuse one another's work; None is what `cache.params` says for the method.

    method: none; dbcache (the first `fn` and last `bn` blocks are always computed, the others where what the first ones do has
    changed by `rdt` or more since the last computed step); first_block (dbcache of one block, without warm-up); teacache
    (whole steps, by how far the first block's modulated input has moved). `warmup` steps are computed first, and never more
    than `mc` in a row are cached. taylorseer: what is skipped is extrapolated, to order `ts_order`, instead of repeated.
    scm_*: which steps must be computed whatever changed (a preset, or runs of computed and of cached steps); under the policy
    "static" all others are cached unseen.
    """

    method: str | None = None
    fn: int | None = None
    bn: int | None = None
    warmup: int | None = None
    rdt: float | None = None
    mc: int | None = None
    taylorseer: bool | None = None
    ts_order: int | None = None
    scm_preset: str | None = None
    scm_policy: str | None = None
    scm_compute_bins: tuple[int, ...] | None = None
    scm_cache_bins: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the step cache did for one output: the share of block runs that were computed, over all guidance branches; and for
    the prompt's branch which steps ran in full, and the change each decision was made by (None where none was needed)."""

    computed_ratio: float
    computed_steps: tuple[bool, ...]
    residuals: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The knobs of one request. None means the model's default; after intake nothing is None but `negative_prompt`
    and `guidance_scale_2`.

    Sizes are pixels. `guidance_scale` is the distilled (embedded) guidance of a model that has one, and `true_cfg_scale` above
    1 together with a negative prompt classifier-free guidance (two forwards a step); of Wan it is `guidance_scale` itself, and
    `guidance_scale_2` that of a second denoiser, None for the same.
    Output `i` of `num_outputs` uses seed `seed + i`. `strength` in (0, 1] is how much of an input picture is noised away.
    A picture has one frame; `fps` is frames per second.
    """

    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    num_outputs: int | None = None
    max_sequence_length: int | None = None
    strength: float | None = None
    num_frames: int | None = None
    fps: int | None = None
    cache: CacheParams | None = None


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """How a text model fills a block; `samplers.unmask` says which algorithm has which parameters. None is its own default."""

    algorithm: str | None = None
    threshold: float | None = None
    edit_threshold: float | None = None
    low_threshold: float | None = None
    penalty_lambda: float | None = None
    max_post_edit_steps: int | None = None
    max_steps: int | None = None
    credit_decay: float | None = None
    credit_weight: float | None = None


@dataclass(frozen=True, slots=True)
class TextParams:
    """The knobs of one request for text; its seed and its number of outputs are in `SamplingParams`.

    messages: the turns of a conversation, as the chat template takes them, and the `tools` it may name; None continues the
    request's prompt as it stands, or `prompt_ids`, the same as tokens. max_tokens: None is as many as the context has room
    for, and at most the model's default. temperature 0 takes the likeliest token. stop: the text ends before the first of
    these strings. logit_bias: (token id, what is added to its logit). suffix: what follows the text, which then fills the gap
    between prompt and suffix. prediction: what the text is expected to be. schema: the JSON schema that the text must satisfy,
    of those `samplers.schema` knows; {} is any object. must_call: names of tools; the text is a call of one of them, or at most
    `most_calls`, and nothing else. logprobs: how many alternatives to tell for each token; None tells nothing.
    """

    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    prompt_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    diffusion: DiffusionParams = DiffusionParams()
    suffix: str = ""
    prediction: str | None = None
    schema: Mapping[str, Any] | None = None
    must_call: tuple[str, ...] = ()
    most_calls: int = 1

    @property
    def is_held(self) -> bool:
        """Whether the text is held to a schema or to calls."""
        return self.schema is not None or bool(self.must_call)


@dataclass(frozen=True, slots=True)
class TextInfo:
    """What frontends may know of a text model. Lengths are tokens; `defaults` are those of the algorithm."""

    vocabulary: int
    block: int
    context: int
    max_tokens: int
    defaults: DiffusionParams


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token of a text: the log-probability it was chosen by, at which refinement of its block, and the likeliest others then.
    `start` counts the text's characters before it.

    This is no left-to-right likelihood: later tokens of the block may have been there already.
    """

    id: int
    text: str
    logprob: float
    step: int
    top: tuple[tuple[int, str, float], ...] = ()
    start: int = 0


@dataclass(frozen=True, slots=True)
class TextUsage:
    """Tokens of the prompt, of these from pages of earlier requests, and of the text; forwards it took part in, and how many of
    them refined nothing; how often a token that was set became another; tokens of the prediction that are in the text, and
    that are not."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    forwards: int
    commits: int
    edits: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.forwards if self.forwards else 0.0


@dataclass(frozen=True, slots=True)
class TextResult:
    """A finished text. `finish_reason` is stop (the model's end, a stop string, a suffix reached, a schema satisfied,
    calls made) or length.
    `tokens` if they were asked for."""

    text: str
    finish_reason: str
    usage: TextUsage
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model accepts. Sizes are pixels; `multiple` divides width and height, `frame_multiple` the frames but one.
    `max_video_pixels` are those of all frames together."""

    multiple: int = 16
    min_side: int = 16
    max_side: int = 8192
    max_pixels: int = 16 * 1024 * 1024
    min_steps: int = 1
    max_steps: int = 1000
    max_outputs: int = 64
    max_sequence_length: int = 512
    max_prompt_chars: int = 32_000
    max_frames: int = 1
    frame_multiple: int = 1
    max_pixels_reason: str = ""
    max_video_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What frontends may know of a loaded model: names, tasks, defaults and limits."""

    id: str
    path: str
    family: str
    pipeline_class: str
    tasks: tuple[Task, ...]
    defaults: SamplingParams
    limits: Limits
    dit_precision: str
    vae_precision: str
    text_encoder_precisions: tuple[str, ...] = ()
    num_gpus: int = 1
    has_guidance: bool = False
    has_guidance_2: bool = False
    cfg_field: str | None = "true_cfg_scale"  # what turns classifier-free guidance on
    blocks: int = 0
    has_teacache: bool = False
    text: TextInfo | None = None  # of a text model
    parameters: int = 1  # of its largest denoiser

    @property
    def makes_video(self) -> bool:
        return any(task.makes_video for task in self.tasks)

    @property
    def makes(self) -> Literal["pictures", "videos", "text"]:
        return "text" if self.text is not None else "videos" if self.makes_video else "pictures"


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded pictures as plain bytes: uint8, frames × height × width × 3 (RGB), row-major."""

    data: bytes
    count: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Request:
    """One intent, validated once at intake and never changed after. A larger `priority` goes first. A `task` left open is
    what the model does, from the input picture if there is one. `model` is the id of one that is loaded; where it is left
    open, the first that does the task.

    `preview_every` asks for a `Preview` event after every so many denoising steps (a `TextPreview` of a text); 0 asks for none.
    `image` is the picture to start from, one frame of any size.
    """

    prompt: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    task: Task | None = None
    id: str = field(default_factory=new_request_id)
    priority: int = 0
    preview_every: int = 0
    image: Frames | None = None
    model: str = ""
    text: TextParams | None = None  # for a text model


def skipped_steps(request: Request) -> int:
    """How many of a complete request's denoising steps its input picture saves (diffusers' `get_timesteps`)."""
    steps, strength = request.sampling.num_inference_steps, request.sampling.strength
    if request.task is not Task.IMAGE_TO_IMAGE or steps is None or strength is None:
        return 0
    return int(max(steps - min(steps * strength, steps), 0))


@dataclass(frozen=True, slots=True)
class Output:
    """One finished sample. `timings_ms` holds wall-clock milliseconds per stage, `queued` and `total`.

    `denoise_ms` are those of each denoising step, without those an earlier process took. `memory_mb` is, for each stage,
    what the worker's process held when the sample had gone through it, in MiB: `host_resident host_anon peak_host_resident`,
    on a GPU `allocated reserved peak_allocated peak_reserved` too. Peaks are those since the process began or, on a GPU, since
    the model was loaded.
    """

    index: int
    seed: int
    frames: Frames
    timings_ms: dict[str, float]
    cache: CacheReport | None = None
    denoise_ms: tuple[float, ...] = ()
    text: TextResult | None = None  # instead of frames, of which there are none then
    memory_mb: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queued:
    """The request was accepted; `ahead` counts the samples waiting or running before it."""

    request_id: str
    ahead: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Sample `index` finished step `step` of `total` in `stage`, and with it `share` of all its work, 0 to 1. Step 0 of the
    first stage says that it is under way."""

    request_id: str
    index: int
    stage: str
    step: int
    total: int
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough picture of sample `index` after denoising step `step`; of a video a few small frames."""

    request_id: str
    index: int
    step: int
    frames: Frames


@dataclass(frozen=True, slots=True)
class Chunk:
    """More of the text of sample `index`, to be appended to its first `start` characters; it will not change any more."""

    request_id: str
    index: int
    start: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class TextPreview:
    """The block of sample `index` that is being filled, as it stands after refinement `step` of it; `text` has a ░ for each mask
    and begins `start` characters after the beginning of the whole text. tokens: (its characters, c: set before, n: new, e: just
    changed, m: masked). `block` counts from the text's first; `masked` are masks left, `forwards` the sample's so far."""

    request_id: str
    index: int
    block: int
    step: int
    start: int
    text: str
    tokens: tuple[tuple[str, str], ...]
    masked: int
    forwards: int


@dataclass(frozen=True, slots=True)
class Done:
    """Terminal: every output of the request, in order."""

    request_id: str
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: the request is over without a result."""

    request_id: str
    code: str
    message: str
    param: str | None = None
    status: int = 500


Event = Queued | Progress | Preview | TextPreview | Chunk | Done | Failed
