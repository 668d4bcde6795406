"""A worker without a model: valid pictures at once, no torch. For frontends' tests and for trying a server out."""

from __future__ import annotations

import time

from stepwell.engine.local import LocalEngine
from stepwell.engine.steps import ItemResult, StagePlan, Step, StepResult
from stepwell.errors import StepFailed
from stepwell.types import Frames, Limits, ModelInfo, Request, SamplingParams, Task

INFO = ModelInfo(
    id="stepwell/fake",
    path="stepwell/fake",
    family="fake",
    pipeline_class="FakePipeline",
    tasks=(Task.TEXT_TO_IMAGE,),
    defaults=SamplingParams(
        width=64, height=64, num_inference_steps=4, guidance_scale=0.0, true_cfg_scale=1.0, num_outputs=1, max_sequence_length=64
    ),
    limits=Limits(max_pixels=2**20),
    dit_precision="fp32",
    vae_precision="fp32",
)


class FakeWorker:
    """Paints a gradient whose colours come from the seed. A prompt holding "poison" fails at its second step."""

    def __init__(self, step_ms: float = 1.0):
        self.info = INFO
        self.batch_tokens = 100_000
        self.choices: tuple[tuple[str, str, str], ...] = ()
        self._step_ms = step_ms
        self._requests: dict[str, tuple[Request, int]] = {}

    def plan(self, request: Request) -> tuple[StagePlan, ...]:
        sampling = request.sampling
        assert sampling.width and sampling.height and sampling.num_inference_steps
        tokens = sampling.width * sampling.height // 256
        return (
            StagePlan("encode_text", 1, 16, True),
            StagePlan("denoise", sampling.num_inference_steps, tokens, True),
            StagePlan("decode", 1, tokens, True),
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
            return ItemResult(sample_id, True, frames=_gradient(seed, sampling.width or 0, sampling.height or 0))
        if stage == "denoise":
            if "poison" in request.prompt and index == 1:
                return ItemResult(sample_id, error=StepFailed("the prompt asked for poison"))
            is_due = request.preview_every > 0 and (index + 1) % request.preview_every == 0
            preview = _gradient(seed, 16, 16) if is_due else None
            return ItemResult(sample_id, index + 1 == sampling.num_inference_steps, preview=preview)
        return ItemResult(sample_id, True)

    def free(self, sample_ids: tuple[str, ...]) -> None:
        for sample_id in sample_ids:
            self._requests.pop(sample_id, None)

    def held(self) -> int:
        return len(self._requests)


def _gradient(seed: int, width: int, height: int) -> Frames:
    color = bytes((seed * factor) % 256 for factor in (7, 13, 29))
    rows = [bytes(c * (y + 1) // height for c in color) * width for y in range(height)]
    return Frames(b"".join(rows), 1, height, width)


def fake_engine(step_ms: float = 1.0, **limits: int) -> LocalEngine:
    """An engine over a FakeWorker; `limits` as LocalEngine's."""
    return LocalEngine(lambda: FakeWorker(step_ms), **limits)
