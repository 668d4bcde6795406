"""Validates a request once, and fills in the model's defaults. After this nobody checks again."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import fields, replace

from stepwell.errors import InvalidRequest, Unsupported
from stepwell.types import ModelInfo, Request, SamplingParams

logger = logging.getLogger(__name__)
MAX_SEED = 2**63 - 1


def complete(request: Request, model: ModelInfo) -> Request:
    """The same request with nothing left open. Raises InvalidRequest or Unsupported, naming the field."""
    if not isinstance(request.prompt, str):
        raise InvalidRequest(f"prompt = {request.prompt!r}: must be a string", param="prompt")
    _check_text("prompt", request.prompt, model)
    if request.task not in model.tasks:
        names = ", ".join(task.value for task in model.tasks)
        raise Unsupported(f"task = {request.task}: {model.id} does {names}", param="task")
    _integer("priority", request.priority, -1000, 1000)
    _integer("preview_every", request.preview_every, 0, model.limits.max_steps)
    for note in _without_effect(request.sampling, model):
        logger.warning("%s", note)
    return replace(request, sampling=_complete_sampling(request.sampling, model))


def _without_effect(asked: SamplingParams, model: ModelInfo) -> list[str]:
    """What was asked for explicitly and changes nothing, with the reason."""
    notes = []
    if asked.guidance_scale and not model.has_guidance:
        notes.append(f"guidance_scale does not apply: {model.id} was made without distilled guidance")
    is_guided = (asked.true_cfg_scale or 0) > 1
    if asked.negative_prompt is not None and not is_guided:
        notes.append("negative_prompt does not apply: true_cfg_scale is not above 1")
    if is_guided and asked.negative_prompt is None:
        notes.append("true_cfg_scale does not apply: there is no negative_prompt")
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
            f"width × height = {sampling.width} × {sampling.height}: at most {limits.max_pixels} pixels", param="size"
        )
    _integer("num_inference_steps", sampling.num_inference_steps, 1, limits.max_steps)
    _integer("num_outputs_per_prompt", sampling.num_outputs, 1, limits.max_outputs)
    _integer("max_sequence_length", sampling.max_sequence_length, 1, limits.max_sequence_length)
    _number("guidance_scale", sampling.guidance_scale, 0.0, 1000.0)
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
    return replace(sampling, seed=seed)


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
