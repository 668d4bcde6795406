"""Validates a request once, and fills in the model's defaults. After this nobody checks again."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import fields, replace

from stepwell.cache.params import complete_cache
from stepwell.engine.intake_text import complete_text
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.types import Frames, Limits, ModelInfo, Request, SamplingParams, Task

logger = logging.getLogger(__name__)
MAX_SEED = 2**63 - 1


def complete(request: Request, model: ModelInfo) -> Request:
    """The same request with nothing left open. Raises InvalidRequest or Unsupported, naming the field."""
    if model.text is not None:
        return complete_text(request, model)
    if request.text is not None:
        raise Unsupported(f"text = …: {model.id} makes no text", param="text")
    if not isinstance(request.prompt, str):
        raise InvalidRequest(f"prompt = {request.prompt!r}: must be a string", param="prompt")
    _check_text("prompt", request.prompt, model)
    task = _task(request, model)
    _integer("priority", request.priority, -1000, 1000)
    _integer("preview_every", request.preview_every, 0, model.limits.max_steps)
    for note in _without_effect(request.sampling, model, task):
        logger.warning("%s", note)
    asked = request.sampling
    if request.image is not None and asked.width is None and asked.height is None:
        area = (model.defaults.width or 0) * (model.defaults.height or 0) if task.makes_video else None
        width, height = size_like(request.image, model.limits, area)
        asked = replace(asked, width=width, height=height)
    return replace(request, model=model.id, task=task, sampling=_complete_sampling(asked, model))


def size_like(picture: Frames, limits: Limits, area: int | None = None) -> tuple[int, int]:
    """(width, height) of a picture, scaled down and rounded to what a model makes; with `area`, scaled to so many pixels."""
    pixels = picture.width * picture.height
    scale = min(
        1.0 if area is None else (area / pixels) ** 0.5,
        (limits.max_pixels / pixels) ** 0.5,
        limits.max_side / max(picture.width, picture.height),
    )

    def fit(side: int) -> int:
        wanted = side * scale
        rounded = round(wanted) if scale == 1 else int(wanted)
        steps = round(rounded / limits.multiple) if scale == 1 else rounded // limits.multiple
        return max(limits.min_side, steps * limits.multiple)

    width, height = fit(picture.width), fit(picture.height)
    if area is not None and width * height > area:  # the shorter side is at its least: the longer one gives way
        most = max(limits.min_side, area // min(width, height) // limits.multiple * limits.multiple)
        width, height = min(width, most), min(height, most)
    return width, height


def _task(request: Request, model: ModelInfo) -> Task:
    """The task asked for, or what the model does with this input."""
    wanted = request.task
    if wanted is None:
        fitting = [task for task in model.tasks if task.takes_image == (request.image is not None)]
        if not fitting:
            does = (
                "starts from a picture; give one (image_path, over HTTP input_reference)"
                if request.image is None
                else "starts from no picture"
            )
            raise InvalidRequest(f"image: {model.id} {does}", param="image")
        wanted = fitting[0]
    if wanted not in model.tasks:
        names = ", ".join(task.value for task in model.tasks)
        raise Unsupported(f"task = {wanted}: {model.id} does {names}", param="task")
    image = request.image
    if wanted.takes_image != (image is not None):
        raise InvalidRequest(f"task = {wanted} {'needs' if wanted.takes_image else 'takes no'} input picture", param="image")
    if image is not None and (image.count != 1 or len(image.data) != image.width * image.height * 3):
        raise InvalidRequest("image must be one RGB frame of width × height × 3 bytes", param="image")
    return wanted


def _without_effect(asked: SamplingParams, model: ModelInfo, task: Task) -> list[str]:
    """What was asked for explicitly and changes nothing, with the reason."""
    notes = []
    if asked.guidance_scale and not model.has_guidance:
        notes.append(f"guidance_scale does not apply: {model.id} was made without guidance")
    defaults = model.defaults  # what was filled in earlier was not asked for
    if asked.guidance_scale_2 is not None and not model.has_guidance_2:
        notes.append(f"guidance_scale_2 does not apply: {model.id} has one transformer")
    if asked.strength not in (None, defaults.strength) and task is not Task.IMAGE_TO_IMAGE:
        why = "no picture to start from was given" if not task.takes_image else "a video's first picture is taken as it is"
        notes.append(f"strength does not apply: {why}")
    if asked.fps not in (None, defaults.fps) and not task.makes_video:
        notes.append("fps does not apply: a picture does not move")
    if model.cfg_field != "true_cfg_scale":
        scale = defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        is_guided = model.cfg_field is not None and (scale or 0) > 1
        if asked.true_cfg_scale not in (None, defaults.true_cfg_scale):
            notes.append(f"true_cfg_scale does not apply: {model.id} has no such guidance")
    else:
        is_guided = (asked.true_cfg_scale or 0) > 1
        if is_guided and asked.negative_prompt is None:
            notes.append("true_cfg_scale does not apply: there is no negative_prompt")
    if asked.negative_prompt is not None and not is_guided:
        why = f"{model.id} takes none" if model.cfg_field is None else f"{model.cfg_field} is not above 1"
        notes.append(f"negative_prompt does not apply: {why}")
    return notes


def _complete_sampling(asked: SamplingParams, model: ModelInfo) -> SamplingParams:
    filled = {
        field.name: getattr(model.defaults, field.name) if value is None else value
        for field in fields(SamplingParams)
        for value in (getattr(asked, field.name),)
    }
    sampling = SamplingParams(**filled)
    limits = model.limits
    _side("width", sampling.width, model)
    _side("height", sampling.height, model)
    assert sampling.width is not None and sampling.height is not None
    if sampling.width * sampling.height > limits.max_pixels:
        raise InvalidRequest(
            f"width × height = {sampling.width} × {sampling.height}: at most {limits.max_pixels} pixels"
            f"{limits.max_pixels_reason}; {_largest(sampling.width, sampling.height, limits)} would do",
            param="size",
        )
    if limits.min_steps == limits.max_steps != sampling.num_inference_steps:
        raise InvalidRequest(
            f"num_inference_steps = {sampling.num_inference_steps}: {model.id} was distilled for {limits.max_steps} steps",
            param="num_inference_steps",
        )
    _integer("num_inference_steps", sampling.num_inference_steps, limits.min_steps, limits.max_steps)
    _integer("num_outputs_per_prompt", sampling.num_outputs, 1, limits.max_outputs)
    _integer("max_sequence_length", sampling.max_sequence_length, 1, limits.max_sequence_length)
    _frames(sampling.num_frames, sampling.width * sampling.height, limits)
    _integer("fps", sampling.fps, 1, 240)
    _number("strength", sampling.strength, 0.0, 1.0)
    if sampling.strength == 0:
        raise InvalidRequest("strength = 0: must be above 0; 0 would leave the picture as it is", param="strength")
    _number("guidance_scale", sampling.guidance_scale, 0.0, 1000.0)
    if sampling.guidance_scale_2 is not None:
        _number("guidance_scale_2", sampling.guidance_scale_2, 0.0, 1000.0)
    _number("true_cfg_scale", sampling.true_cfg_scale, 0.0, 1000.0)
    if sampling.negative_prompt is not None:
        if not isinstance(sampling.negative_prompt, str):
            raise InvalidRequest(f"negative_prompt = {sampling.negative_prompt!r}: must be a string", param="negative_prompt")
        _check_text("negative_prompt", sampling.negative_prompt, model)
    seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
    _integer("seed", seed, 0, MAX_SEED)
    assert sampling.num_outputs is not None
    if seed + sampling.num_outputs - 1 > MAX_SEED:
        raise InvalidRequest(f"seed = {seed}: output i uses seed + i, which must stay below 2**63", param="seed")
    return replace(
        sampling, seed=seed, guidance_scale_2=_second_guidance(asked, sampling, model), cache=complete_cache(asked.cache, model)
    )


def _second_guidance(asked: SamplingParams, filled: SamplingParams, model: ModelInfo) -> float | None:
    """Who asks for one guidance means it for both denoisers; the model's own second one is for who asks for none."""
    if not model.has_guidance_2:
        return None
    if asked.guidance_scale_2 is None and (asked.guidance_scale is not None or filled.guidance_scale_2 is None):
        return filled.guidance_scale
    return filled.guidance_scale_2


def _largest(width: int, height: int, limits: Limits) -> str:
    """The largest size of the same shape that is allowed."""
    factor = math.sqrt(limits.max_pixels / (width * height))
    sides = (max(limits.min_side, int(side * factor) // limits.multiple * limits.multiple) for side in (width, height))
    return "×".join(str(side) for side in sides)


def _frames(value: object, pixels: int, limits: Limits) -> None:
    _integer("num_frames", value, 1, limits.max_frames)
    assert isinstance(value, int)
    step = limits.frame_multiple
    if limits.max_video_pixels is not None and value * pixels > limits.max_video_pixels:
        most = max(0, limits.max_video_pixels // pixels - 1) // step * step + 1
        raise InvalidRequest(
            f"num_frames = {value}: at this size at most {most} fit into the memory that is free here", param="num_frames"
        )
    if (value - 1) % step:
        below = (value - 1) // step * step + 1
        above = f" or {below + step}" if below + step <= limits.max_frames else ""
        raise InvalidRequest(
            f"num_frames = {value}: must be a multiple of {step} and one more; {below}{above} would do", param="num_frames"
        )


def _check_text(name: str, value: str, model: ModelInfo) -> None:
    if len(value) > model.limits.max_prompt_chars:
        raise InvalidRequest(f"{name} has {len(value)} characters: at most {model.limits.max_prompt_chars}", param=name)
    if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
        raise InvalidRequest(f"{name} holds a lone surrogate, which is not text", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} = {value!r}: must be an integer", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} = {value}: must be between {low} and {high}", param=name)


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise InvalidRequest(f"{name} = {value!r}: must be a finite number", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} = {value}: must be between {low:g} and {high:g}", param=name)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer no float can hold
        return False


def _side(name: str, value: object, model: ModelInfo) -> None:
    limits = model.limits
    _integer(name, value, limits.min_side, limits.max_side)
    assert isinstance(value, int)
    if value % limits.multiple:
        below = max(limits.min_side, value // limits.multiple * limits.multiple)
        above = min(limits.max_side, (value // limits.multiple + 1) * limits.multiple)
        raise InvalidRequest(
            f"{name} = {value}: must be a multiple of {limits.multiple}; {below} or {above} would do", param=name
        )
