"""What `/v1/chat/completions` and `/v1/completions` have in common: fields, log-probabilities, usage, and how answers are put
together, whole or in events.

What is left out is the model's choice, as in Python: temperature 0, which is what block diffusion models are published with
(OpenAI's own models take 1), and as many tokens as the context has room for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field

from stepwell import __version__
from stepwell.api.body import Body, Models, pick_model
from stepwell.errors import InvalidRequest
from stepwell.samplers.unmask import params_of
from stepwell.types import (
    Chunk,
    DiffusionParams,
    Done,
    Event,
    ModelInfo,
    Output,
    Queued,
    Request,
    SamplingParams,
    TextParams,
    TextPreview,
    TokenInfo,
    replace,
)

LEAST_LOGPROB = -9999.0  # JSON has no infinity
NO_EFFECT = ("user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier")
PREDICTED = ("accepted_prediction_tokens", "rejected_prediction_tokens")
SUMMED = ("completion_tokens", "forwards", "commits", "edits", *PREDICTED)
BROKEN = "\ufffd"


class Diffusion(Body):
    """The `diffusion` object: how blocks are filled. What is left out is the server's, or the algorithm's default."""

    algorithm: str | None = None
    threshold: float | None = Field(None, description="Probability from which a token is set.")
    edit_threshold: float | None = Field(None, description="Probability from which a set token is replaced.")
    low_threshold: float | None = None
    penalty_lambda: float | None = None
    max_post_edit_steps: int | None = None
    max_steps: int | None = Field(None, description="Refinements of a block, at most.")
    credit_decay: float | None = None
    credit_weight: float | None = None

    def params(self) -> DiffusionParams:
        return params_of(self.model_dump(exclude_none=True))


class StreamOptions(Body):
    """What a stream says beside the text."""

    include_usage: bool | None = Field(None, description="A last event with `usage`.")
    include_obfuscation: Literal[False] | None = None


class TextBody(Body):
    """What every request for text may say: OpenAI's fields first, then ours."""

    model: str | None = None
    max_tokens: int | None = Field(None, description="As many as there is room for, if left out.")
    temperature: float | None = Field(None, description="0, which takes the likeliest token, if left out.")
    top_p: float | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, description="Choice i uses seed + i.")
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = Field(None, description="By token id.")
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    user: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    metadata: dict[str, str] | None = Field(None, description="No effect.")
    store: Literal[False] | None = Field(None, description="No effect; nothing is stored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="No effect.")
    ignore_eos: bool | None = Field(None, description="Go on to max_tokens, whatever the model says.")
    diffusion: Diffusion | None = None
    diffusing: bool | None = Field(None, description="With stream: events that show each refinement of a block, too.")

    def check_stream(self) -> None:
        for name in ("stream_options", "diffusing"):
            if getattr(self, name) and not self.stream:
                raise InvalidRequest(f"{name} needs stream = true", param=name)

    def text(self) -> TextParams:
        """These fields as parameters; a value that is wrong in itself is the engine's to refuse."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "ignore_eos": self.ignore_eos,
            "diffusion": None if self.diffusion is None else self.diffusion.params(),
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return TextParams(
            max_tokens=self.max_tokens,
            stop=tuple(stop),
            logit_bias=tuple((_token(name), bias) for name, bias in (self.logit_bias or {}).items()),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def sampling(self) -> SamplingParams:
        return SamplingParams(seed=self.seed, num_outputs=self.n)


def _token(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise InvalidRequest(f"logit_bias: {name[:100]!r} is not the id of a token", param="logit_bias")
    return int(name)


# ------------------------------------------------------------------------------------------------------------- answers
class Shape(Protocol):
    """How one of the two routes writes choices. Each call has its own, which may remember what it has sent."""

    whole: str  # `object` of an answer
    part: str  # `object` of an event

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        """A finished choice."""
        ...

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins a choice with."""
        ...

    def delta(self, index: int, text: str, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
        """More of a choice."""
        ...

    def empty(self, index: int) -> dict[str, Any]:
        """A choice of which there is nothing more."""
        ...

    def ending(self, index: int, output: Output) -> list[dict[str, Any]]:
        """What a stream ends a choice with, all of whose text was sent."""
        ...


@dataclass(slots=True)
class Answer:
    """One call on its way: its requests (several where there are several prompts), and what becomes of their events.

    model: the name under which it is served; n: choices of each request; sent: characters and tokens of each choice so far.
    """

    model: str
    fingerprint: str
    requests: tuple[Request, ...]
    n: int
    shape: Shape
    stream: bool
    with_usage: bool
    ignored: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))
    sent: dict[int, tuple[int, int]] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)

    def response(self) -> dict[str, Any]:
        """The whole answer, once all requests are done."""
        every = ((place * self.n + output.index, output) for place in sorted(self.done) for output in self.done[place].outputs)
        choices = [self.shape.choice(index, output) for index, output in every]
        return {**self._about(self.shape.whole), "choices": choices, "usage": self.usage()}

    def take(self, place: int, event: Event) -> list[dict[str, Any]]:
        """An event of a request as those of the stream."""
        choices: list[dict[str, Any]] = []
        if isinstance(event, Queued):
            for index in range(place * self.n, (place + 1) * self.n):
                choices += self.shape.opening(index)
        elif isinstance(event, Chunk):
            choices = self._more(place * self.n + event.index, event.text, event.tokens)
        elif isinstance(event, TextPreview):
            return [{**self._part([self.shape.empty(place * self.n + event.index)]), "diffusion": _shown(event)}]
        elif isinstance(event, Done):
            self.done[place] = event
            for output in event.outputs:
                index, text = place * self.n + output.index, output.text
                assert text is not None
                characters, tokens = self.sent.get(index, (0, 0))
                choices += self._more(index, text.text[characters:], text.tokens[tokens:])
                choices += self.shape.ending(index, output)
        return [self._part([choice]) for choice in choices]

    def last(self) -> list[dict[str, Any]]:
        """What a stream ends with, once all requests are done."""
        return [{**self._part([]), "usage": self.usage()}] if self.with_usage else []

    def usage(self) -> dict[str, Any]:
        """Tokens and forwards of all requests; a prompt counts once, however many choices it has."""
        done = [[output.text.usage for output in self.done[place].outputs if output.text] for place in sorted(self.done)]
        prompt, cached = (sum(getattr(of[0], name) for of in done) for name in ("prompt_tokens", "cached_tokens"))
        sums = {name: sum(getattr(usage, name) for of in done for usage in of) for name in SUMMED}
        written, forwards = sums["completion_tokens"], sums["forwards"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {name: sums[name] for name in PREDICTED},
            **{name: sums[name] for name in ("forwards", "commits", "edits")},
            "tokens_per_forward": round(written / forwards, 4) if forwards else 0.0,
        }

    def _more(self, index: int, text: str, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
        characters, count = self.sent.get(index, (0, 0))
        self.sent[index] = characters + len(text), count + len(tokens)
        return self.shape.delta(index, text, tokens) if text or tokens else []

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._about(self.shape.part), "choices": choices, **({"usage": None} if self.with_usage else {})}

    def _about(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.requests[0].id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def answer_of(body: TextBody, requests: Sequence[Request], shape: Shape, models: Models) -> Answer:
    """The answer to a body that has become these requests."""
    body.check_stream()
    name = next(name for name, model in models.items() if model.id == requests[0].model)
    return Answer(
        model=name,
        fingerprint=fingerprint_of(models[name]),
        requests=tuple(replace(request, preview_every=int(bool(body.diffusing))) for request in requests),
        n=body.n or 1,
        shape=shape,
        stream=bool(body.stream),
        with_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        ignored=tuple(name for name in NO_EFFECT if getattr(body, name) is not None),
    )


def pick_text_model(body: TextBody, models: Models) -> ModelInfo:
    return pick_model(body.model, models, "text")


def fingerprint_of(model: ModelInfo) -> str:
    """Changes with whatever may change the text of a seed: the model, how it runs, and this package."""
    return f"fp_{hashlib.sha256(repr((__version__, model)).encode()).hexdigest()[:12]}"


def finish_of(output: Output) -> dict[str, Any]:
    """How a choice ended, and what it took."""
    assert output.text is not None
    timings_ms = {name: round(ms, 3) for name, ms in output.timings_ms.items()}
    return {"finish_reason": output.text.finish_reason, "seed": output.seed, "timings_ms": timings_ms}


def _shown(event: TextPreview) -> dict[str, Any]:
    """A block as it stands. Its tokens are c: set before, n: new, e: just changed, m: masked."""
    return {
        "block": event.block,
        "step": event.step,
        "offset": event.start,
        "text": event.text,
        "tokens": [{"t": piece, "s": state} for piece, state in event.tokens],
        "masked": event.masked,
        "forwards": event.forwards,
    }


def logprob_of(value: float) -> float:
    return max(value, LEAST_LOGPROB)


def bytes_of(text: str) -> list[int] | None:
    """The bytes of a token; None for one that is part of a character, whose bytes nobody has kept."""
    return None if BROKEN in text else list(text.encode())
