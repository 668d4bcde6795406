"""A worker without a model: valid pictures and moving pictures at once, no torch. For frontends' tests and for trying a
server out: `stepwell serve --model-path stepwell/fake-image` (or `stepwell/fake-video?step_ms=50`).

Colours come from the seed. Words of the prompt make trouble at the second denoising step: "poison" fails it, "gluttony"
runs out of memory, "hang" never ends it, "crash" kills the process.
"""

from __future__ import annotations

import os
import signal
import time
from urllib.parse import parse_qs

from stepwell.engine.steps import ItemResult, StagePlan, Step, StepResult
from stepwell.errors import InvalidRequest, OutOfMemory, StepFailed
from stepwell.types import Frames, Limits, ModelInfo, Request, SamplingParams, Task, replace

_IMAGE = ModelInfo(
    id="stepwell/fake-image",
    path="stepwell/fake-image",
    family="fake",
    pipeline_class="FakePipeline",
    tasks=(Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE),
    defaults=SamplingParams(
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        true_cfg_scale=1.0,
        num_outputs=1,
        max_sequence_length=64,
        strength=0.6,
        num_frames=1,
        fps=1,
    ),
    limits=Limits(max_pixels=2**20),
    dit_precision="fp32",
    vae_precision="fp32",
)
FAKES = {
    _IMAGE.id: _IMAGE,
    "stepwell/fake-video": replace(
        _IMAGE,
        id="stepwell/fake-video",
        path="stepwell/fake-video",
        tasks=(Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO),
        defaults=replace(_IMAGE.defaults, num_frames=17, fps=8),
        has_guidance_2=True,
        limits=replace(_IMAGE.limits, max_frames=257, frame_multiple=4),
    ),
}


def fake_worker(model_path: str) -> FakeWorker:
    """The worker for `stepwell/fake-…`, with `?step_ms=…` if wanted."""
    name, _, query = model_path.partition("?")
    options = parse_qs(query)
    try:
        step_ms = float(options.pop("step_ms", ["1"])[0])
    except ValueError:
        step_ms = -1.0
    if options or not 0 <= step_ms < 1e6:
        raise InvalidRequest(
            f"model_path = {model_path!r}: a fake model takes ?step_ms=NUMBER and nothing else", param="model_path"
        )
    return FakeWorker(step_ms, FAKES[name])


class FakeWorker:
    """Paints gradients, in videos moving ones."""

    def __init__(self, step_ms: float = 1.0, info: ModelInfo = _IMAGE):
        self.info = info
        self.batch_tokens = {info.id: 100_000}
        self.choices: tuple[tuple[str, str, str], ...] = ()
        self._step_ms = step_ms
        self._requests: dict[str, tuple[Request, int]] = {}

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        sampling = request.sampling
        assert sampling.width and sampling.height and sampling.num_inference_steps and sampling.num_frames
        chunks = _chunks(request)
        tokens = max(1, sampling.width * sampling.height * chunks * 4 // 1024)
        return (
            StagePlan("encode_text", 1, 16, True),
            StagePlan("denoise", sampling.num_inference_steps, tokens, True),
            StagePlan("decode", chunks, max(1, tokens // chunks), True),
        )

    def execute(self, step: Step) -> StepResult:
        for sample in step.new:
            seed = sample.request.sampling.seed
            assert seed is not None
            self._requests[sample.sample_id] = sample.request, seed + sample.index
        time.sleep(self._step_ms / 1e3)
        return StepResult(tuple(self._advance(step.stage, *item) for item in step.items), self._step_ms)

    def _advance(self, stage: str, sample_id: str, index: int) -> ItemResult:
        request, seed = self._requests[sample_id]
        sampling = request.sampling
        if stage == "decode":
            count = sampling.num_frames or 1
            if index + 1 < _chunks(request):
                return ItemResult(sample_id)
            return ItemResult(sample_id, True, frames=_gradient(seed, sampling.width or 0, sampling.height or 0, count))
        if stage == "denoise":
            if index == 1:
                error = _trouble(request.prompt)
                if error is not None:
                    return ItemResult(sample_id, error=error)
            is_due = request.preview_every > 0 and (index + 1) % request.preview_every == 0
            preview = _gradient(seed, 16, 16, _chunks(request)) if is_due else None
            return ItemResult(sample_id, index + 1 == sampling.num_inference_steps, preview=preview)
        return ItemResult(sample_id, True)

    def free(self, sample_ids: tuple[str, ...]) -> None:
        for sample_id in sample_ids:
            self._requests.pop(sample_id, None)

    def forget(self, request: Request) -> None:
        pass  # it saves nothing

    def held(self) -> int:
        return len(self._requests)

    def close(self) -> None:
        pass  # it began nothing


def _chunks(request: Request) -> int:
    """How many steps decoding takes: four frames each, but the first, as in the VAEs of video models."""
    return ((request.sampling.num_frames or 1) + 3) // 4


def _trouble(prompt: str) -> Exception | None:
    if "crash" in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    while "hang" in prompt:
        time.sleep(60)
    if "gluttony" in prompt:
        return OutOfMemory("this request does not fit into memory; the prompt asked for gluttony")
    return StepFailed("the prompt asked for poison") if "poison" in prompt else None


def _gradient(seed: int, width: int, height: int, count: int = 1) -> Frames:
    color = bytes((seed * factor) % 256 for factor in (7, 13, 29))
    rows = [bytes(c * (y + 1) // height for c in color) * width for y in range(height)]
    shifts = (height * frame // count for frame in range(count))
    return Frames(b"".join(b"".join(rows[shift:] + rows[:shift]) for shift in shifts), count, height, width)
