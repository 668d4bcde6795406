"""The Python API: load a model, generate, close.

with DiffGenerator.from_pretrained(path_or_id, **options) as g:
    outputs = g.generate(prompt=…, width=…, height=…, num_inference_steps=…, seed=…, num_outputs_per_prompt=…)
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from stepwell.cache.params import cache_of
from stepwell.config.load import load, torchrun_place, unknown_name
from stepwell.config.schema import EngineOptions
from stepwell.engine.api import EngineInfo
from stepwell.engine.checkpoint_files import fingerprint
from stepwell.engine.local import LocalEngine
from stepwell.engine.steps import StepExecutor
from stepwell.errors import InvalidRequest, Unsupported, by_code
from stepwell.generator_text import GeneratedText, text_requests
from stepwell.media.images import Parameters, file_stem, load_image, unused
from stepwell.media.video import save
from stepwell.types import (
    CacheParams,
    CacheReport,
    Done,
    Event,
    Failed,
    Frames,
    ModelInfo,
    Output,
    Request,
    SamplingParams,
    replace,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SAMPLING = {
    "width": "width",
    "height": "height",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "guidance_scale_2": "guidance_scale_2",
    "true_cfg_scale": "true_cfg_scale",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "num_outputs_per_prompt": "num_outputs",
    "max_sequence_length": "max_sequence_length",
    "strength": "strength",
    "num_frames": "num_frames",
    "fps": "fps",
    "cache": "cache",
}


@dataclass(frozen=True)
class GeneratedOutput:
    """One picture or video. `timings` are wall-clock milliseconds per stage; `path` is where it was saved, if it was.

    `cache`, `denoise_ms` and `memory_mb` are those of `types.Output`. Outputs of one prompt share their `request_id`.
    """

    frames: np.ndarray  # (frames, height, width, 3) uint8
    seed: int
    timings: dict[str, float]
    parameters: Parameters
    cache: CacheReport | None = None
    path: Path | None = None
    denoise_ms: tuple[float, ...] = ()
    memory_mb: dict[str, dict[str, float]] = field(default_factory=dict)
    request_id: str = ""

    @property
    def image(self) -> Image:
        """The first frame."""
        from PIL import Image

        return Image.fromarray(self.frames[0])

    def save(self, path: str | Path) -> Path:
        """Write it, its parameters inside; returns where it is. The suffix decides: .png, .jpg or .webp of a picture; .mp4, .gif
        or .webp of a video, whose frames are `clip/0000.png` and so on for `clip.png`. Raises InvalidRequest."""
        return save(Frames(self.frames.tobytes(), *self.frames.shape[:3]), self.parameters, Path(path))


class DiffGenerator:
    """A model, or several, in this process. Not safe to share between threads; several generators may live side by side."""

    def __init__(self, engine: LocalEngine, info: EngineInfo, *, resumes: bool = False):
        self._engine = engine
        self._resumes = resumes
        self._info = info

    @property
    def model(self) -> ModelInfo:
        """The first."""
        return self._info.model

    @classmethod
    def from_pretrained(cls, model_path: str | Path | Sequence[str | Path] = "stepwell/tiny-flux", **options: Any) -> Self:
        """Load a model from a bundled id, a local folder in diffusers layout, or a hub id; or a list of those.

        options: any engine option by its configuration name (`dit_precision`, `vae_precision`,
        `text_encoder_precisions`, `device`, `max_batch_tokens`, …).
        """
        paths = [model_path] if isinstance(model_path, str | Path) else model_path
        place = torchrun_place()
        if place is not None and place.rank > 0:
            raise Unsupported(f"rank {place.rank} of torchrun: a generator starts its own ranks, by num_gpus; start it without")
        loaded = load((EngineOptions,), flags={"model_path": [str(path) for path in paths], **options})
        engine = open_engine(loaded[EngineOptions])
        return cls(engine, engine.open(), resumes=loaded[EngineOptions].checkpoint_path is not None)

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        model: str | Path = "",
        image: str | Path | Image | None = None,
        output_path: str | Path | None = None,
        on_event: Callable[[Event], None] | None = None,
        preview_every: int = 0,
        **sampling: Any,
    ) -> list[GeneratedOutput]: ...

    @overload
    def generate(
        self,
        *,
        messages: Sequence[Mapping[str, Any]],
        model: str | Path = "",
        on_event: Callable[[Event], None] | None = None,
        preview_every: int = 0,
        **sampling: Any,
    ) -> list[GeneratedText]: ...

    def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str | Path = "",
        image: str | Path | Image | None = None,
        output_path: str | Path | None = None,
        on_event: Callable[[Event], None] | None = None,
        preview_every: int = 0,
        **sampling: Any,
    ) -> list[GeneratedOutput] | list[GeneratedText]:
        """Generate `num_outputs_per_prompt` pictures or videos for a prompt, or for each of several prompts, together.

        model: which of the models, as its path; the first that does the task if left out.
        image: a picture to start from, as a file, a URL or a Pillow image; `strength` in (0, 1] of it is noised away.
        sampling: width, height (pixels), num_inference_steps, guidance_scale, guidance_scale_2, true_cfg_scale,
        negative_prompt, seed (output i uses seed + i; random if left out), num_outputs_per_prompt, max_sequence_length,
        strength, num_frames, fps, and `cache`, the step cache's parameters by name (`types.CacheParams`):
        `{"method": "dbcache", "rdt": 0.24}`.
        output_path: a folder to save PNGs in, or MP4s, with their parameters as metadata.
        on_event: called in this thread with every event. Raises StepwellError if any of the requests fails.

        A text model answers a prompt, or the last of several messages (`{"role": …, "content": …}`), as `GeneratedText`. It
        takes max_tokens, temperature (0, the default, is greedy), top_p, stop, seed, n, logprobs, logit_bias, penalties, tools,
        and `diffusion`, how its blocks are filled: `{"algorithm": "LowConfidence", "threshold": 0.9}`; a `suffix` that follows
        the text, a `schema` it must satisfy, a `prediction` of it; `must_call`, names of tools of which it calls one, or at most
        `most_calls`. `preview_every` refinements `on_event` is given the block that is being filled (`types.TextPreview`).
        With `raw=True` a prompt is continued as it stands.
        """
        chosen = next((each for each in self._info.models if each.id == str(model)), self.model)
        if chosen.text is not None:
            if image is not None or output_path is not None:
                raise InvalidRequest("image and output_path do not apply to a text model", param="image")
            texts = [] if messages is not None and not prompt else [prompt] if isinstance(prompt, str) else _prompts(prompt)
            asked = text_requests(texts, messages, sampling)
            wanted = [replace(request, model=chosen.id, preview_every=preview_every) for request in asked]
            finished = self._run(wanted, on_event)
            return [GeneratedText.of(request, output) for request, outputs in finished for output in outputs]
        if messages is not None:
            raise InvalidRequest(f"messages: {chosen.id} is no text model; give a prompt", param="messages")
        prompts = [prompt] if isinstance(prompt, str) else _prompts(prompt)
        for name in sampling:
            if name not in _SAMPLING:
                raise unknown_name(name, _SAMPLING, "as a sampling parameter")
        if not isinstance(sampling.get("cache"), CacheParams | None):
            sampling["cache"] = cache_of(sampling["cache"])
        params = SamplingParams(**{_SAMPLING[name]: value for name, value in sampling.items()})
        start = None if image is None else _frames(image)
        wanted = [Request(text, params, preview_every=preview_every, image=start, model=str(model)) for text in prompts]
        finished = self._run(wanted, on_event)
        made = [self._finish(request, output, output_path) for request, outputs in finished for output in outputs]
        for request, _ in finished:
            self._engine.forget(request)
        return made

    def _run(
        self, wanted: Sequence[Request], on_event: Callable[[Event], None] | None
    ) -> list[tuple[Request, tuple[Output, ...]]]:
        """Each request as it was completed, with its outputs."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        requests: list[Request] = []
        try:
            for request in wanted:
                if self._resumes:  # the same call finds what a process that was killed has saved
                    request = replace(request, id=f"req-{len(requests)}-{fingerprint(request)[:24]}")
                requests.append(self._engine.submit(request, events.put))
            results = self._collect(requests, events, on_event)
        except BaseException:
            for request in requests:
                self._engine.cancel(request.id)
            raise
        return [(request, results[request.id]) for request in requests]

    @staticmethod
    def _collect(
        requests: list[Request], events: queue.SimpleQueue[Event], on_event: Callable[[Event], None] | None
    ) -> dict[str, tuple[Output, ...]]:
        results: dict[str, tuple[Output, ...]] = {}
        while len(results) < len(requests):
            event = events.get()
            if on_event is not None:
                on_event(event)
            if isinstance(event, Failed):
                raise by_code(event.code, event.message, event.param)
            if isinstance(event, Done):
                results[event.request_id] = event.outputs
        return results

    def _finish(self, request: Request, output: Output, folder: str | Path | None) -> GeneratedOutput:
        import numpy as np

        frames = output.frames
        shape = (frames.count, frames.height, frames.width, 3)
        pixels = np.frombuffer(frames.data, np.uint8).reshape(shape)
        parameters = Parameters.of(request, output, self._info.of(request))
        path = None
        if folder is not None:
            suffix = ".mp4" if request.task is not None and request.task.makes_video else ".png"
            path = save(frames, parameters, unused(Path(folder) / f"{file_stem(parameters)}{suffix}"))
        return GeneratedOutput(
            pixels,
            output.seed,
            dict(output.timings_ms),
            parameters,
            output.cache,
            path,
            denoise_ms=output.denoise_ms,
            memory_mb=output.memory_mb,
            request_id=request.id,
        )

    def sleep(self) -> None:
        """Let go of the model and its memory until `wake`; generating raises Asleep meanwhile. May be called twice."""
        self._engine.sleep()

    def wake(self) -> None:
        """Load the model again. May be called twice."""
        self._engine.wake()

    def close(self) -> None:
        """Free everything. May be called twice."""
        self._engine.shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_engine(options: EngineOptions) -> LocalEngine:
    """A local engine for these options; nothing is loaded until it is opened."""

    def build_worker() -> StepExecutor:
        from stepwell.engine.process import build

        return build(options)

    return LocalEngine(
        build_worker,
        max_running=options.max_running_samples,
        max_queued=options.max_queued_samples,
        max_wait_s=options.max_queue_seconds,
        policy=options.scheduling_policy,
    )


def _frames(image: str | Path | Image) -> Frames:
    if isinstance(image, str | Path):
        return load_image(image)
    rgb = image.convert("RGB")
    return Frames(rgb.tobytes(), 1, rgb.height, rgb.width)


def _prompts(prompt: object) -> list[str]:
    if not isinstance(prompt, list | tuple) or not prompt:
        raise InvalidRequest(f"prompt = {prompt!r}: must be a string or a non-empty list of strings", param="prompt")
    return list(prompt)
