"""The Python API's part for text models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from stepwell.config.load import unknown_name
from stepwell.errors import InvalidRequest
from stepwell.samplers.unmask import params_of
from stepwell.types import DiffusionParams, Output, Request, SamplingParams, TextParams, TextUsage, TokenInfo

_SAMPLING = {"seed": "seed", "n": "num_outputs", "num_outputs_per_prompt": "num_outputs"}
_TEXT = tuple(field.name for field in fields(TextParams) if field.name not in ("messages", "prompt_ids"))

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "stop": ((str, tuple, list), "a string or a list of strings"),
    "tools": ((tuple, list), "a list of mappings"),
    "must_call": ((tuple, list), "a list of names of tools"),
    "ignore_eos": ((bool,), "true or false"),
    "logit_bias": ((Mapping, tuple, list), "a mapping from token ids to numbers"),
    "diffusion": ((Mapping, DiffusionParams), "a mapping"),
}


@dataclass(frozen=True)
class GeneratedText:
    """One text. `timings` are wall-clock milliseconds per stage; the rest is that of `types.TextResult`."""

    text: str
    finish_reason: str
    usage: TextUsage
    seed: int
    timings: dict[str, float]
    tokens: tuple[TokenInfo, ...] = ()
    request_id: str = ""

    @classmethod
    def of(cls, request: Request, output: Output) -> GeneratedText:
        result = output.text
        assert result is not None
        timings = dict(output.timings_ms)
        return cls(result.text, result.finish_reason, result.usage, output.seed, timings, result.tokens, request.id)


def text_requests(
    prompts: Sequence[str], messages: Sequence[Mapping[str, Any]] | None, asked: Mapping[str, Any]
) -> list[Request]:
    """One request for each prompt, which is what a user says, or with `raw` what is to be continued; or for the messages."""
    asked = dict(asked)
    is_raw = asked.pop("raw", False)
    sampling = SamplingParams(**{_SAMPLING[name]: asked.pop(name) for name in list(asked) if name in _SAMPLING})
    for name in asked:
        if name not in _TEXT:
            raise unknown_name(name, (*_TEXT, *_SAMPLING, "raw"), "as a parameter of text")
    for name, (kinds, what) in _KINDS.items():
        if name in asked and not isinstance(asked[name], kinds):
            raise InvalidRequest(f"{name} = {asked[name]!r}: must be {what}", param=name)
    if not all(isinstance(turn, Mapping) for turn in messages or ()):
        raise InvalidRequest("messages: must be mappings of role and content", param="messages")
    stop, bias, diffusion = asked.pop("stop", ()), asked.pop("logit_bias", ()), asked.pop("diffusion", DiffusionParams())
    asked["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    asked["logit_bias"] = tuple(bias.items()) if isinstance(bias, Mapping) else tuple(bias)
    asked["diffusion"] = diffusion if isinstance(diffusion, DiffusionParams) else params_of(diffusion)
    asked |= {name: tuple(asked.get(name, ())) for name in ("tools", "must_call")}
    if messages is not None:
        if prompts or is_raw:
            raise InvalidRequest("messages go without a prompt", param="messages")
        return [Request("", sampling, text=TextParams(messages=tuple(map(dict, messages)), **asked))]
    if is_raw:
        return [Request(prompt, sampling, text=TextParams(**asked)) for prompt in prompts]
    says = ({"role": "user", "content": prompt} for prompt in prompts)
    return [Request("", sampling, text=TextParams(messages=(turn,), **asked)) for turn in says]
