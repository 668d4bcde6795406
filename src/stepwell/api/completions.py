"""The Completions API (`POST /v1/completions`): prompts that are continued as they stand, without a template."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from stepwell.api.body import Models, parse_body
from stepwell.api.texts import Answer, TextBody, answer_of, finish_of, logprob_of, pick_text_model
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.types import Output, Request, TokenInfo, replace

MOST_PROMPTS, MOST_TEXTS = 128, 512  # of one call


class CompletionsBody(TextBody):
    """A text, or several, to be continued."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Strings, or the ids of tokens.")
    suffix: str | None = Field(None, description="What follows: the text fills a gap in a block that holds all of the suffix.")
    echo: bool | None = Field(None, description="Begin each text with its prompt.")
    logprobs: int | None = Field(None, description="How many alternatives to tell for each token.")
    best_of: int | None = Field(None, description="The same as n.")


def to_answer(body: Any, models: Models) -> Answer:
    """A JSON body as requests, still to be completed, and the answer to it. Raises InvalidRequest, Unsupported or
    ModelNotFound, naming the field."""
    parsed = parse_body(CompletionsBody, body)
    model = pick_text_model(parsed, models)
    prompts = _prompts(parsed.prompt)
    if parsed.best_of not in (None, parsed.n or 1):
        raise Unsupported(f"best_of = {parsed.best_of}: all texts that are made are sent; it must be n", param="best_of")
    if len(prompts) * (parsed.n or 1) > MOST_TEXTS:
        raise InvalidRequest(f"n = {parsed.n} for {len(prompts)} prompts: at most {MOST_TEXTS} texts in one call", param="n")
    if parsed.echo and parsed.logprobs is not None:
        raise Unsupported("echo with logprobs: the prompt's tokens have none in this version", param="echo")
    if parsed.echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise Unsupported("echo needs prompts that are strings", param="echo")
    text, id = replace(parsed.text(), logprobs=parsed.logprobs, suffix=parsed.suffix or ""), f"cmpl-{uuid.uuid4().hex[:24]}"
    requests = [
        Request(
            prompt if isinstance(prompt, str) else "",
            parsed.sampling(),
            id=f"{id}-{place}" if place else id,
            model=model.id,
            text=text if isinstance(prompt, str) else replace(text, prompt_ids=tuple(prompt)),
        )
        for place, prompt in enumerate(prompts)
    ]
    echoed = [request.prompt for request in requests for _ in range(parsed.n or 1)] if parsed.echo else []
    return answer_of(parsed, requests, CompletionShape(echoed, tells=parsed.logprobs is not None), models)


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Each prompt, as a string or as tokens."""
    prompts: list[Any] = [given] if isinstance(given, str) or all(isinstance(each, int) for each in given) else list(given)
    if given == [] or [] in prompts:
        raise InvalidRequest("prompt: a list must not be empty", param="prompt")
    if len(prompts) > MOST_PROMPTS:
        raise InvalidRequest(f"prompt: {len(prompts)} prompts; at most {MOST_PROMPTS} in one call", param="prompt")
    return prompts


class CompletionShape:
    """Writes choices as plain text. echoed: what each choice begins with, if anything."""

    whole = part = "text_completion"

    def __init__(self, echoed: Sequence[str], *, tells: bool):
        self._echoed, self._tells = echoed, tells

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        result = output.text
        assert result is not None
        return {**self._part(index, self._echo(index) + result.text, result.tokens), **finish_of(output)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._part(index, self._echo(index), ())] if self._echo(index) else []

    def delta(self, index: int, text: str, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
        return [self._part(index, text, tokens)]

    def empty(self, index: int) -> dict[str, Any]:
        return self._part(index, "", ())

    def ending(self, index: int, output: Output) -> list[dict[str, Any]]:
        return [{**self.empty(index), **finish_of(output)}]

    def _echo(self, index: int) -> str:
        return self._echoed[index] if self._echoed else ""

    def _part(self, index: int, text: str, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": _logprobs(tokens) if self._tells else None, "finish_reason": None}


def _logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [logprob_of(token.logprob) for token in tokens],
        "top_logprobs": [{text: logprob_of(value) for _, text, value in reversed(token.top)} for token in tokens],
        "text_offset": [token.start for token in tokens],
    }
