"""What programs written for OpenAI's Completions API do, by the real SDK, sync and async, over a socket."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types import Completion

from tests.support.llada2 import byte_ids
from tests.support.sdk import Sdk

COMPLETE = "completions.create"


def ask(sdk: Sdk, prompt: Any = "hello", **body: Any) -> Any:
    extra = {"ignore_eos": True, "diffusion": {"threshold": 0.0}, **body.pop("extra", {})}
    return sdk(COMPLETE, **{"model": "writer", "prompt": prompt, "max_tokens": 16, "extra_body": extra, **body})


def texts(answer: Any) -> list[str]:
    return [choice.text for choice in answer.choices]


def joined(chunks: list[Completion], index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def test_an_answer(sdk: Sdk) -> None:
    answer = ask(sdk, seed=7)
    assert isinstance(answer, Completion) and answer.object == "text_completion" and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs, choice.seed) == (0, "length", None, 7)  # type: ignore[attr-defined]
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)
    assert answer.system_fingerprint and answer.model == "writer"


def test_a_prompt_is_continued_as_it_stands_be_it_text_or_tokens(one: Sdk) -> None:
    as_text, as_tokens, several = (ask(one, prompt) for prompt in ("hello", byte_ids("hello"), [byte_ids("hello")]))
    assert texts(as_text) == texts(as_tokens) == texts(several) != texts(ask(one, "hellp"))
    assert as_tokens.usage.prompt_tokens == 5


def test_several_prompts_are_answered_in_order(sdk: Sdk) -> None:
    prompts = ["hello", "what else there is to say", "x"]
    body = {"n": 2, "seed": 5, "temperature": 1.0}
    answer = ask(sdk, prompts, **body)
    alone = [ask(sdk, prompt, **body) for prompt in prompts]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert texts(answer) == [text for each in alone for text in texts(each)]
    assert answer.usage.prompt_tokens == sum(map(len, prompts)) and answer.usage.completion_tokens == 6 * 16
    chunks = ask(sdk, prompts, stream=True, **body)
    assert [joined(chunks, index) for index in range(6)] == texts(answer)
    assert sum(choice.finish_reason == "length" for chunk in chunks for choice in chunk.choices) == 6


def test_echo(sdk: Sdk) -> None:
    plain = texts(ask(sdk, ["one", "two"], n=2))
    echoed = ask(sdk, ["one", "two"], n=2, echo=True)
    assert texts(echoed) == [f"{prompt}{text}" for prompt, text in zip(["one", "one", "two", "two"], plain, strict=True)]
    chunks = ask(sdk, ["one", "two"], n=2, echo=True, stream=True)
    assert [joined(chunks, index) for index in range(4)] == texts(echoed)
    assert texts(ask(sdk, "one", echo=True, max_tokens=0)) == ["one"]


def test_logprobs(sdk: Sdk) -> None:
    answer = ask(sdk, logprobs=2, temperature=1.0, seed=3)
    (choice,) = answer.choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 16
    for token, value, top, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):  # fmt: skip
        assert value <= 0 and 1 <= len(top) <= 2 and value <= max(top.values())
        assert "�" in token or choice.text[offset:].startswith(token)
    assert told.text_offset == sorted(told.text_offset) and told.text_offset[0] == 0
    chunks = ask(sdk, logprobs=2, temperature=1.0, seed=3, stream=True)
    parts = [c.logprobs for chunk in chunks for c in chunk.choices]
    assert [t for part in parts for t in part.tokens] == told.tokens
    assert [t for part in parts for t in part.text_offset] == told.text_offset
    assert ask(sdk, logprobs=0).choices[0].logprobs.top_logprobs == [{}] * 16


@pytest.mark.parametrize("count", [0, 1])
def test_very_short(one: Sdk, count: int) -> None:
    answer = ask(one, max_tokens=count)
    assert answer.usage.completion_tokens == count and answer.choices[0].finish_reason == "length"
    assert joined(ask(one, max_tokens=count, stream=True)) == answer.choices[0].text


def test_an_empty_prompt_is_one(one: Sdk) -> None:
    assert ask(one, "").usage.prompt_tokens == 0


def test_a_gap_before_a_suffix_is_filled(sdk: Sdk) -> None:
    """Prompt, gap and suffix share a block of 8 tokens; what follows changes what comes before it."""
    filled = ask(sdk, "he", suffix="lo", max_tokens=4)
    assert filled.usage.completion_tokens == 4 and filled.choices[0].finish_reason == "stop"
    assert texts(filled) != texts(ask(sdk, "he", suffix="XY", max_tokens=4))
    assert joined(ask(sdk, "he", suffix="lo", max_tokens=4, stream=True)) == filled.choices[0].text
    assert ask(sdk, "he", suffix="lo", max_tokens=openai.omit).usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "he", "suffix": "lo", "max_tokens": 5}, "suffix", "max_tokens = 4 would do"),
        ({"suffix": "much too long for a block"}, "suffix", "a block of 8"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": ["x", []]}, "prompt", ""),
        ({"prompt": ["x"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["x"] * 65, "n": 8}, "n", "at most 512 texts"),
        ({"prompt": 5}, "prompt", "5"),
        ({"prompt": [1, 272]}, "prompt", "272"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": ["fine", "x" * 1100]}, "prompt", "context holds 1024"),
        ({"best_of": 2}, "best_of", "must be n"),
        ({"echo": True, "logprobs": 1}, "echo", "logprobs"),
        ({"echo": True, "prompt": [5]}, "echo", "strings"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"tools": []}, "tools", "unknown name"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_names_field_and_reason(one: Sdk, body: dict[str, Any], param: str, words: str, stream: bool) -> None:
    extra = {"tools": body.pop("tools")} if "tools" in (body := dict(body)) else {}
    with pytest.raises(openai.BadRequestError) as caught:
        one(COMPLETE, **{"model": "writer", "prompt": "x", "stream": stream, "extra_body": extra, **body})
    assert caught.value.param is not None and caught.value.param.startswith(param) and words in caught.value.message
