"""Validates a request for text once, and fills in what is left open."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import fields, replace

from stepwell.errors import InvalidRequest, Unsupported
from stepwell.samplers.calls import MOST_CALLS, calls_of
from stepwell.samplers.schema import shape_of
from stepwell.samplers.unmask import algorithm_of, merged
from stepwell.types import ModelInfo, Request, SamplingParams, Task, TextInfo, TextParams

MAX_SEED = 2**63 - 1
MOST_STOPS, MOST_LOGPROBS, MOST_MESSAGES = 16, 20, 10_000


def complete_text(request: Request, model: ModelInfo) -> Request:
    """The same request with nothing left open but max_tokens, which depends on the prompt's length. Raises InvalidRequest or
    Unsupported, naming the field."""
    assert model.text is not None
    if request.task not in (None, Task.TEXT_TO_TEXT):
        raise Unsupported(f"task = {request.task}: {model.id} does {Task.TEXT_TO_TEXT.value}", param="task")
    if request.image is not None:
        raise InvalidRequest(f"image does not apply: {model.id} reads text only", param="image")
    _integer("priority", request.priority, -1000, 1000)
    _integer("preview_every", request.preview_every, 0, model.limits.max_steps)
    text = request.text or TextParams()
    _check_prompt(request, text, model)
    _check_text(text, model.text)
    algorithm_of(merged(text.diffusion, model.text.defaults))
    if text.is_held:
        _check_held(text)
    return replace(request, model=model.id, task=Task.TEXT_TO_TEXT, text=text, sampling=_sampling(request.sampling, model))


def _sampling(asked: SamplingParams, model: ModelInfo) -> SamplingParams:
    for field in fields(SamplingParams):
        if field.name not in ("seed", "num_outputs") and getattr(asked, field.name) is not None:
            raise InvalidRequest(f"{field.name} does not apply: {model.id} makes text", param=field.name)
    count = 1 if asked.num_outputs is None else asked.num_outputs
    _integer("n", count, 1, model.limits.max_outputs)
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    _integer("seed", seed, 0, MAX_SEED - count + 1)
    return SamplingParams(seed=seed, num_outputs=count)


def _check_prompt(request: Request, text: TextParams, model: ModelInfo) -> None:
    if not isinstance(request.prompt, str):
        raise InvalidRequest(f"prompt = {request.prompt!r}: must be a string", param="prompt")
    if text.must_call and not text.tools:
        raise InvalidRequest("must_call needs tools", param="must_call")
    if text.messages is None and text.tools:
        raise InvalidRequest("tools go with messages", param="tools")
    if text.messages is not None:
        if request.prompt:
            raise InvalidRequest("prompt and messages are both given; give one of them", param="messages")
        if not 1 <= len(text.messages) <= MOST_MESSAGES or not all(isinstance(message, dict) for message in text.messages):
            raise InvalidRequest("messages: must be a list of one message or more", param="messages")
    if text.prompt_ids and (request.prompt or text.messages is not None):
        raise InvalidRequest("prompt is given twice, once as tokens", param="prompt")
    name = "prompt" if text.messages is None else "messages"
    _check_words(name, request.prompt if text.messages is None else str(text.messages), model)
    for name, value in (("messages", text.messages), ("tools", text.tools), ("stop", text.stop), ("schema", text.schema)):
        _check_whole(name, json.dumps(value, ensure_ascii=False, skipkeys=True, default=str))
    _check_words("suffix", text.suffix, model)
    _check_words("prediction", text.prediction or "", model)


def _check_words(name: str, words: object, model: ModelInfo) -> None:
    if not isinstance(words, str):
        raise InvalidRequest(f"{name} = {words!r}: must be a string", param=name)
    if len(words) > model.limits.max_prompt_chars:
        raise InvalidRequest(f"{name} has {len(words)} characters: at most {model.limits.max_prompt_chars}", param=name)
    _check_whole(name, words)


def _check_whole(name: str, words: str) -> None:
    if any(0xD800 <= ord(char) <= 0xDFFF for char in words):
        raise InvalidRequest(f"{name} holds a lone surrogate, which is not text", param=name)


def _check_held(text: TextParams) -> None:
    what, which = ("a schema", "says") if text.schema is not None else ("calls that are asked for", "say")
    if text.schema is not None and text.must_call:
        raise InvalidRequest("must_call does not go with a schema; give one of them", param="must_call")
    for name, value in (("suffix", text.suffix), ("stop", text.stop), ("prediction", text.prediction)):
        if value:
            raise InvalidRequest(f"{name} does not go with {what}, which {which} where the text ends", param=name)
    for field in fields(text.diffusion):
        value = getattr(text.diffusion, field.name)
        if value is not None and (field.name, value) != ("algorithm", "LowConfidence") and field.name != "threshold":
            param = f"diffusion.{field.name}"
            raise InvalidRequest(f"{param} does not apply with {what}, whose values take a threshold only", param=param)
    if text.schema is not None:
        shape_of(text.schema)
    else:
        _integer("most_calls", text.most_calls, 1, MOST_CALLS)
        calls_of(text.tools, text.must_call, text.most_calls)


def _check_text(text: TextParams, info: TextInfo) -> None:
    for token in text.prompt_ids:
        _integer("prompt: token", token, 0, info.vocabulary - 1)
    if text.max_tokens is not None:
        _integer("max_tokens", text.max_tokens, 0, info.context)
    _number("temperature", text.temperature, 0.0, 10.0)
    _number("top_p", text.top_p, 0.0, 1.0)
    if text.top_p == 0:
        raise InvalidRequest("top_p = 0: must be above 0; temperature = 0 takes the likeliest token", param="top_p")
    _number("frequency_penalty", text.frequency_penalty, -2.0, 2.0)
    _number("presence_penalty", text.presence_penalty, -2.0, 2.0)
    if len(text.stop) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in text.stop):
        raise InvalidRequest(f"stop = {list(text.stop)!r}: must be at most {MOST_STOPS} strings, none empty", param="stop")
    if text.logprobs is not None:
        _integer("logprobs", text.logprobs, 0, min(MOST_LOGPROBS, info.vocabulary))
    for token, bias in text.logit_bias:
        _integer("logit_bias: token", token, 0, info.vocabulary - 1)
        _number("logit_bias", bias, -100.0, 100.0)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} = {value!r}: must be an integer between {low} and {high}", param=name.split(":")[0])


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} = {value!r}: must be a number between {low:g} and {high:g}", param=name)
