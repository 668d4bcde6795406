"""What programs written for OpenAI's Chat Completions API do, by the real SDK, sync and async, over a socket."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.support.answers import check_refusal
from tests.support.llada2 import byte_ids
from tests.support.sdk import KINDS, Sdk
from tests.support.server import Running

CHAT = "chat.completions.create"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
QUICK = {"diffusion": {"threshold": 0.0}}  # a forward a block
LONG = {"ignore_eos": True}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def ask(sdk: Sdk, extra: dict[str, Any] | None = None, **body: Any) -> Any:
    """A chat of 16 tokens, whatever they are."""
    extra_body = {**LONG, **QUICK, **(extra or {})}
    return sdk(CHAT, **{"model": "writer", "messages": HELLO, "max_tokens": 16, "extra_body": extra_body, **body})


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = (choice for chunk in chunks for choice in chunk.choices if choice.index == index)
    return "".join(choice.delta.content or "" for choice in choices)


def refused(sdk: Sdk, **body: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        sdk(CHAT, **{"model": "writer", "messages": HELLO, **body})
    return caught.value


# ------------------------------------------------------------------------------------------------------------- whole answers
def test_an_answer(sdk: Sdk) -> None:
    before = int(time.time())
    answer = ask(sdk, seed=7)
    assert isinstance(answer, ChatCompletion) and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert (answer.model, before <= answer.created <= time.time()) == ("writer", True)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant" and choice.message.content and choice.message.tool_calls is None
    assert choice.seed == 7 and choice.timings_ms["denoise"] > 0  # type: ignore[attr-defined]
    usage = answer.usage
    assert usage is not None and usage.completion_tokens == 16 and usage.total_tokens == usage.prompt_tokens + 16
    assert usage.forwards == 3 and usage.tokens_per_forward == pytest.approx(16 / 3, abs=1e-4)  # type: ignore[attr-defined]
    assert answer.system_fingerprint and ask(sdk).system_fingerprint == answer.system_fingerprint


def test_greedy_is_the_default_and_a_seed_repeats(one: Sdk) -> None:
    def text(**body: Any) -> str:
        return str(ask(one, **body).choices[0].message.content)

    assert text() == text() == text(temperature=0)
    assert text(temperature=1, seed=5) == text(temperature=1, seed=5) != text(temperature=1, seed=6)


def test_choices_have_seeds_of_their_own(sdk: Sdk) -> None:
    three = ask(sdk, n=3, seed=20, temperature=1.0)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert [choice.seed for choice in three.choices] == [20, 21, 22]
    texts = [choice.message.content for choice in three.choices]
    assert len(set(texts)) == 3 and texts[1] == ask(sdk, seed=21, temperature=1.0).choices[0].message.content
    assert three.usage.completion_tokens == 48 and three.usage.prompt_tokens == ask(sdk).usage.prompt_tokens


def test_a_prompt_that_was_seen_is_cached(one: Sdk) -> None:
    messages = [{"role": "user", "content": "a question nobody has asked before"}]
    first, again = (ask(one, messages=messages).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < again.prompt_tokens_details.cached_tokens <= again.prompt_tokens


def test_turns_of_all_roles_and_in_parts(one: Sdk) -> None:
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
             {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}]  # fmt: skip
    assert ask(one, messages=plain).choices[0].message.content == ask(one, messages=parts).choices[0].message.content
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    earlier = ask(one).choices[0].message.model_dump()
    turns = [*HELLO, earlier, {"role": "user", "content": "and?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]  # fmt: skip
    assert ask(one, messages=turns, tools=[WEATHER]).usage.prompt_tokens > 150


# ------------------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize(
    "body",
    [{}, {"temperature": 1.0, "seed": 3}, {"n": 2, "temperature": 1.0, "seed": 4}, {"extra": {"diffusion": {"threshold": 1.0}}},
     {"extra": {"diffusion": {"algorithm": "JointThreshold", "max_post_edit_steps": 2}}}],
    ids=["greedy", "seed", "two", "token by token", "edits"],
)  # fmt: skip
def test_a_stream_is_the_same_text(sdk: Sdk, body: dict[str, Any]) -> None:
    whole = ask(sdk, **body)
    chunks = ask(sdk, stream=True, **body)
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.usage for chunk in chunks} == {None}
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert own[0].delta.role == "assistant" and {part.delta.role for part in own[1:]} == {None}
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert joined(chunks, choice.index) == choice.message.content and len(own) > 3
        assert own[-1].seed == choice.seed or "seed" not in body


def test_usage_comes_last_if_asked_for(sdk: Sdk) -> None:
    chunks = ask(sdk, stream=True, n=2, stream_options={"include_usage": True})
    assert {chunk.usage for chunk in chunks[:-1]} == {None} and chunks[-1].choices == []
    whole = ask(sdk, n=2).usage
    assert chunks[-1].usage.completion_tokens == 32 and chunks[-1].usage.prompt_tokens == whole.prompt_tokens


@pytest.mark.parametrize("algorithm", ["LowConfidence", "JointThreshold"])
def test_who_wants_to_watch_sees_every_refinement(sdk: Sdk, algorithm: str) -> None:
    """Drafts ride beside an empty delta, so that a client that knows nothing of them reads the very same text."""
    body: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2}
    extra = {"diffusion": {"algorithm": algorithm, "threshold": 0.1}}
    whole = ask(sdk, extra=extra, **body)
    chunks = ask(sdk, extra={**extra, "diffusing": True}, stream=True, stream_options={"include_usage": True}, **body)
    assert [joined(chunks, index) for index in (0, 1)] == [choice.message.content for choice in whole.choices]
    drafts = [(chunk.choices[0], chunk.diffusion) for chunk in chunks if "diffusion" in (chunk.model_extra or {})]
    usage = chunks[-1].usage
    assert len(drafts) == usage.forwards - usage.commits > 4
    for choice, draft in drafts:
        assert choice.delta.content is None and choice.delta.role is None and choice.finish_reason is None
        pieces = "".join(token["t"] for token in draft["tokens"])
        assert pieces == draft["text"] or "�" in pieces
        assert {token["s"] for token in draft["tokens"]} <= set("cnem") and draft["forwards"] > 0
        assert sum(token["s"] == "m" for token in draft["tokens"]) == draft["text"].count("░") <= 8
    last = {choice.index: draft for choice, draft in drafts}
    for choice in whole.choices:
        draft = last[choice.index]
        assert choice.message.content[draft["offset"] :].startswith(draft["text"].split("░")[0].split("�")[0])
    assert {draft["step"] for _, draft in drafts} > {1, 2} and len({draft["block"] for _, draft in drafts}) > 1
    assert (usage.edits > 0) == any(token["s"] == "e" for _, draft in drafts for token in draft["tokens"])


def test_what_goes_over_the_wire(writer: Running) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    lines = httpx.post(f"{writer.url}/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])
    first, *_, last = (json.loads(line.removeprefix("data: ")) for line in lines[:-2])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None} and first["usage"] is None
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3


# -------------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_lengths(one: Sdk, name: str, count: int) -> None:
    body = {"max_tokens": openai.omit, name: count}
    answer = ask(one, **body)
    assert answer.usage.completion_tokens == count and answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == joined(ask(one, stream=True, **body))
    assert (answer.choices[0].message.content == "") == (count == 0)


def test_without_a_length_it_is_the_models(one: Sdk) -> None:
    assert ask(one, max_tokens=openai.omit).usage.completion_tokens == 24


def test_stop_strings(sdk: Sdk) -> None:
    """One that lies across the edge of two blocks, so that its first half is certain a forward before."""
    body: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": 1}
    tokens = ask(sdk, logprobs=True, extra={"logit_bias": {str(i): 30 for i in byte_ids("abcdefghij")}}, **body)
    text, prompt = tokens.choices[0].message.content, tokens.usage.prompt_tokens
    edge = 16 - prompt % 8  # where the text's third block begins
    stop = text[edge - 2 : edge + 2]
    assert text.index(stop) == edge - 2, "seed 1 writes the same earlier"
    biased = {**body, "logit_bias": {str(i): 30 for i in byte_ids("abcdefghij")}}
    for given in (stop, ["never", stop], [stop, text[edge + 4 :]]):
        made = ask(sdk, stop=given, **biased)
        assert (made.choices[0].message.content, made.choices[0].finish_reason) == (text[: edge - 2], "stop")
        chunks = ask(sdk, stop=given, stream=True, **biased)
        assert joined(chunks) == text[: edge - 2] and chunks[-1].choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens <= edge + 2


def test_characters_stay_whole_where_tokens_are_bytes(sdk: Sdk) -> None:
    euro = {"logit_bias": {str(i): 60 for i in byte_ids("€")}, "temperature": 1.0, "seed": 2, "max_tokens": 96}
    text = ask(sdk, **euro).choices[0].message.content
    chunks = ask(sdk, stream=True, **euro)
    assert set(text) - {"�"}, "no bytes came in an order that makes a character"
    assert joined(chunks) == text and len(chunks) > 6


def test_a_bias_decides_and_penalties_move_away(one: Sdk) -> None:
    q = str(byte_ids("q")[0])
    assert ask(one, logit_bias={q: 100}).choices[0].message.content == "q" * 16
    mild = {"logit_bias": {q: 8.0}, "max_tokens": 32}
    free = ask(one, **mild).choices[0].message.content.count("q")
    for name in ("frequency_penalty", "presence_penalty"):
        assert ask(one, **mild, **{name: 2.0}).choices[0].message.content.count("q") < free


def test_logprobs(sdk: Sdk) -> None:
    answer = ask(sdk, logprobs=True, top_logprobs=3, extra={"diffusion": {"threshold": 1.0}})
    told = answer.choices[0].logprobs.content
    assert len(told) == 16
    for token in told:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert [each.logprob for each in token.top_logprobs] == sorted((e.logprob for e in token.top_logprobs), reverse=True)
        assert token.token == token.top_logprobs[0].token and token.logprob == token.top_logprobs[0].logprob  # greedy
        assert token.bytes is None if "�" in token.token else bytes(token.bytes).decode() == token.token
        assert 0 <= token.commit_step < 8
    chunks = ask(sdk, logprobs=True, top_logprobs=3, stream=True, extra={"diffusion": {"threshold": 1.0}})
    streamed = [c.logprobs.content for chunk in chunks for c in chunk.choices if c.logprobs]
    assert [token for part in streamed for token in part] == told and len(streamed) > 2
    assert ask(sdk, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_each_request_chooses_how_blocks_are_filled(one: Sdk) -> None:
    def forwards(**diffusion: Any) -> int:
        return int(ask(one, extra={"diffusion": diffusion}).usage.forwards)

    assert forwards(threshold=0.0) < forwards(threshold=0.2) < forwards(threshold=1.0)
    assert forwards(algorithm="JointThreshold", threshold=0.0, max_post_edit_steps=0) < forwards(threshold=1.0)


def test_what_has_no_effect_is_said(one: Sdk) -> None:
    body = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"}
    with openai.OpenAI(api_key="any", base_url=one._options["base_url"]) as client:
        answer = client.chat.completions.with_raw_response.create(
            model="writer", messages=HELLO, max_tokens=1, tool_choice="none", response_format={"type": "text"},
            modalities=["text"], parallel_tool_calls=True, **body,
        )  # type: ignore[call-overload]  # fmt: skip
    assert set(answer.headers["x-ignored-params"].split(", ")) == set(body)


# ------------------------------------------------------------------------------------------------------ schemas, predictions
class Person(BaseModel):
    """What the SDK makes a strict schema of."""

    name: str
    age: int
    mood: Literal["glad", "sad"]
    tags: list[str]


def test_a_text_of_a_schema_is_parsed_by_the_sdk(sdk: Sdk) -> None:
    body: dict[str, Any] = {"model": "writer", "messages": HELLO, "max_tokens": 200, "temperature": 1.0, "seed": 2}
    answer = sdk("chat.completions.parse", response_format=Person, **body)
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person) and person.mood in ("glad", "sad") and answer.choices[0].finish_reason == "stop"
    text = answer.choices[0].message.content
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": Person.model_json_schema()}}
    chunks = sdk(CHAT, response_format=schema, stream=True, **body)
    assert Person.model_validate_json(joined(chunks)) == Person.model_validate_json(text)


def test_any_object(one: Sdk) -> None:
    for seed in range(3):
        answer = one(CHAT, model="writer", messages=HELLO, response_format={"type": "json_object"}, seed=seed, temperature=1.0,
                     max_tokens=300)  # fmt: skip
        assert answer.choices[0].finish_reason == "stop" and isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_prediction_that_comes_true_saves_forwards(one: Sdk) -> None:
    """Of a text of one letter, each by a forward of its own where nothing is predicted."""
    sure = {"logit_bias": {str(byte_ids("q")[0]): 60}, "extra": {"diffusion": {"threshold": 1.0}}}
    plain, right, wrong = (
        ask(one, **sure, prediction=None if content is None else {"type": "content", "content": content})
        for content in (None, [{"type": "text", "text": "q" * 12}, {"type": "text", "text": "q" * 4}], "something else")
    )
    assert {made.choices[0].message.content for made in (plain, right, wrong)} == {"q" * 16}
    assert right.usage.forwards <= 4 < 16 <= plain.usage.forwards == wrong.usage.forwards
    details = [made.usage.completion_tokens_details for made in (plain, right, wrong)]
    assert [(each.accepted_prediction_tokens, each.rejected_prediction_tokens) for each in details] == [(0, 0), (16, 0), (0, 14)]


# -------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "bot"),
        ({"messages": [{"role": "user", "content": "x", "mood": "glad"}]}, "messages[0].mood", "unknown name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "reads text only"),
        ({"messages": [{"role": "user", "content": "x" * 1100}]}, "messages", "context holds 1024"),
        ({"max_tokens": 100_000}, "max_tokens", "between 0 and 1024"),
        ({"max_tokens": -1}, "max_tokens", "-1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "contradicts"),
        ({"max_tokens": "3"}, "max_tokens", "'3'"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": 0}, "n", "n = 0"),
        ({"n": 65}, "n", "between 1 and 64"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop", "empty"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not the id"),
        ({"logit_bias": {"272": 1}}, "logit_bias", "between 0 and 271"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "101"),
        ({"frequency_penalty": 3}, "frequency_penalty", "3"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"extra_body": {"diffusing": True}}, "diffusing", "needs stream"),
        ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict", "leave it"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls", "False"),
        ({"store": True}, "store", "True"),
        ({"service_tier": "flex"}, "service_tier", "flex"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "should be 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema is missing"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema", "goes with"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "a+"}}}},
         "response_format.json_schema", "json_schema.schema.pattern: not supported"),
        ({"response_format": {"type": "json_object"}, "stop": "}"}, "stop", "schema"),
        ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "tools", "tool_choice = 'none'"),
        ({"prediction": {"type": "content", "content": [{"type": "image"}]}}, "prediction.content", "text parts"),
        ({"prediction": {"type": "content", "content": [{"type": "text", "text": 5}]}}, "prediction.content", "text parts"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unknown name"),
        ({"extra_body": {"diffusion": {"algorithm": "Magic"}}}, "diffusion.algorithm", "LowConfidence"),
        ({"extra_body": {"diffusion": {"credit_decay": 0.5}}}, "diffusion.credit_decay", "does not apply to LowConfidence"),
        ({"extra_body": {"diffusion": {"treshold": 0.5}}}, "diffusion.treshold", "did you mean 'diffusion.threshold'"),
        ({"model": "gpt-4"}, "model", "this server serves 'writer'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_names_field_and_reason(one: Sdk, body: dict[str, Any], param: str, words: str, stream: bool) -> None:
    if words == "needs stream" and stream:
        return
    error = refused(one, stream=stream, **body)
    assert error.status_code == (404 if "model" in body else 400)
    assert error.param == param and words in error.message, error.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("param", ["messages", "tools", "stop", "schema"])
def test_half_a_character_is_refused(writer: Running, param: str, stream: bool) -> None:
    half = "\ud800"
    changed: dict[str, Any] = {
        "messages": {"messages": [{"role": "user", "content": half}]},
        "tools": {"tools": [{"type": "function", "function": {"name": half}}]},
        "stop": {"stop": ["x", half]},
        "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {half: {}}}}}},
    }[param]
    body = {"model": "writer", "messages": HELLO, "stream": stream, **changed}
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{writer.url}/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert check_refusal(answer, 400, param=param)["message"] == f"{param} holds a lone surrogate, which is not text"


@pytest.mark.parametrize("body", ["null", "[]", "5"])
def test_a_body_that_is_no_object_is_shown(writer: Running, body: str) -> None:
    answer = httpx.post(f"{writer.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert check_refusal(answer, 400)["message"] == f"the body = {json.loads(body)}: must be a JSON object"


@pytest.mark.parametrize("depth", [101, 500, *range(900, 1000, 5), 100_000])
def test_what_is_nested_too_deep_is_refused(writer: Running, depth: int) -> None:
    parameters = '{"a":' * depth + "[]" + "}" * depth
    body = json.dumps({"model": "writer", "messages": HELLO, "tools": [WEATHER]}).replace('{"type": "object"}', parameters)
    answer = httpx.post(f"{writer.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert "the body has more than 100 lists and objects within each other" in check_refusal(answer, 400)["message"]


def test_a_text_model_makes_no_pictures(writer: Running) -> None:
    for path in ("/v1/images/generations", "/v1/videos"):
        answer = httpx.post(f"{writer.url}{path}", json={"prompt": "x"})
        assert "'writer' makes text; use POST /v1/chat/completions" in check_refusal(answer, 400, param="model")["message"]


# ------------------------------------------------------------------------------------------------------------------ retries
@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_joins_its_first_attempt(writer: Running, kind: Any) -> None:
    sdk = Sdk(kind, f"{writer.url}/v1", lost=1, max_retries=2)
    answer = sdk(CHAT, model="writer", messages=HELLO, max_tokens=4, extra_headers={"Idempotency-Key": f"once {kind}"})
    again = sdk(CHAT, model="writer", messages=HELLO, max_tokens=4, extra_headers={"Idempotency-Key": f"once {kind}"})
    assert answer.id == again.id and answer.choices == again.choices
