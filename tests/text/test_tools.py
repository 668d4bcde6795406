"""Calls of tools: told of through the template, and read out of what the model writes, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from openai import BadRequestError
from openai.types.chat import ChatCompletionMessage

from stepwell import DiffGenerator
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest
from stepwell.generator import open_engine
from tests.support.llada2 import byte_ids, text_repository
from tests.support.scripted import Scripted
from tests.support.sdk import Sdk
from tests.support.server import running

CHAT = "chat.completions.create"
HELLO = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}]
PARIS, ROME = ({"name": "weather", "arguments": {"city": city}} for city in ("Paris", "Römerstadt"))

CLOSED = {"name": "weather", "arguments": {"city": 'the "<tool_call>" and </tool_call> \\ tags', "n": [True, -1.5e3]}}


def called(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


@pytest.fixture(scope="module")
def engine() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It speaks bytes, and has room to be told of several tools."""
    return text_repository(tmp_path_factory.mktemp("caller"), {"max_position_embeddings": 2048})


@pytest.fixture(scope="module")
def caller(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sdk]:
    options = EngineOptions(model_path=str(random_model), threads=1)
    with running(open_engine(options), tmp_path_factory.mktemp("data"), options, served_model_name="caller") as made:
        yield Sdk("sync", f"{made.url}/v1")


@pytest.fixture(scope="module")
def sdk(engine: Scripted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sdk]:
    with running(engine, tmp_path_factory.mktemp("data"), served_model_name="scribe") as made:
        yield Sdk("sync", f"{made.url}/v1")


def whole(sdk: Sdk, **body: Any) -> tuple[str | None, list[tuple[str, Any]], str]:
    """Content, calls and how it ended."""
    (choice,) = sdk(CHAT, **{"model": "scribe", "messages": HELLO, "tools": TOOLS, **body}).choices
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    return choice.message.content, calls, choice.finish_reason


def streamed(sdk: Sdk, **body: Any) -> tuple[str | None, list[tuple[str, Any]], str]:
    """The same, put together as clients do."""
    content, finish, calls = "", "", {}
    for chunk in sdk(CHAT, **{"model": "scribe", "messages": HELLO, "tools": TOOLS, "stream": True, **body}):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or []:
            assert call.index == len(calls) and call.id and call.type == "function"
            calls[call.index] = (call.function.name, json.loads(call.function.arguments))
    return content or (None if calls else ""), list(calls.values()), finish


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (called(PARIS), None, [PARIS]),
        (f"Let me look.\n{called(PARIS)}\n{called(ROME)}", "Let me look.", [PARIS, ROME]),
        (f"{called(PARIS)} and then\n", " and then", [PARIS]),
        (f"One{called(PARIS)}\ntwo", "One\ntwo", [PARIS]),
        (called(PARIS).removesuffix("</tool_call>"), None, [PARIS]),
        (called({"name": "now"}), None, [{"name": "now", "arguments": {}}]),
        (f"{called(CLOSED)} {called(ROME)}", None, [CLOSED, ROME]),
        (called(CLOSED).removesuffix("ool_call>"), None, [CLOSED]),
        (f"<tool_call> no, {called(ROME)}", "<tool_call> no,", [ROME]),
        ('<tool_call>{"name": "a</tool_call> and so on', '<tool_call>{"name": "a</tool_call> and so on', []),
        (f'<tool_call>{{"name": "a</tool_call>\n{called(ROME)}', '<tool_call>{"name": "a</tool_call>', [ROME]),
        (f"<tool_call>{{}} x</tool_call>{called(ROME)}", "<tool_call>{} x</tool_call>", [ROME]),
        ('<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
        ('<tool_call>{"name": "a", "arguments": {"x": 1e999}}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', '<tool_call>{"name": "\\ud800"}</tool_call>', []),
        (
            '<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}</tool_call>',
            None,
            [{"name": "a", "arguments": {"x": "\ud800"}}],
        ),
        ("No call,\n but a < b <tool", "No call,\n but a < b <tool", []),
        ("Broken <tool_call>{'name': 1}</tool_call> one", "Broken <tool_call>{'name': 1}</tool_call> one", []),
        (f"<tool_call>[]</tool_call>\n{called(ROME)}", "<tool_call>[]</tool_call>", [ROME]),
        ('<tool_call>{"name": "weath', '<tool_call>{"name": "weath', []),
        ("  spaces around \n", "  spaces around \n", []),
        ("", "", []),
    ],
)
def test_calls_are_read_whole_and_in_any_pieces(
    engine: Scripted, sdk: Sdk, text: str, content: str | None, calls: list[dict[str, Any]]
) -> None:
    engine.text, engine.finish = text, "stop"
    wanted = (content, [(call["name"], call["arguments"]) for call in calls], "tool_calls" if calls else "stop")
    assert whole(sdk) == wanted
    for engine.piece in (1, 2, 7, 1000):
        assert streamed(sdk) == wanted


def test_a_text_that_was_cut_short_says_so(engine: Scripted, sdk: Sdk) -> None:
    engine.text, engine.finish = f"{called(PARIS)}\n<tool_call>", "length"
    assert whole(sdk)[1:] == streamed(sdk)[1:] == ([("weather", PARIS["arguments"])], "length")


def test_without_tools_nothing_is_taken_out(engine: Scripted, sdk: Sdk) -> None:
    engine.text, engine.finish = called(PARIS), "stop"
    for body in ({"tools": None}, {"tool_choice": "none"}):
        assert whole(sdk, **body) == streamed(sdk, **body) == (engine.text, [], "stop")
        text = engine.asked[-1].text
        assert text is not None and text.tools == ()


def test_the_template_is_told_and_an_answer_goes_back_as_it_came(engine: Scripted, sdk: Sdk) -> None:
    engine.text, engine.finish = called(PARIS), "stop"
    message = sdk(CHAT, model="scribe", messages=HELLO, tools=TOOLS, tool_choice="auto").choices[0].message
    assert isinstance(message, ChatCompletionMessage) and message.tool_calls is not None
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    whole(sdk, messages=[*HELLO, message.model_dump(), answer])
    text = engine.asked[-1].text
    assert text is not None and text.tools == tuple(TOOLS) and text.messages is not None
    assert text.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert text.messages[2] == answer


def test_calls_in_each_of_several_choices(engine: Scripted, sdk: Sdk) -> None:
    engine.text, engine.finish, engine.piece = called(PARIS), "stop", 3
    seen: dict[int, int] = {}
    for chunk in sdk(CHAT, model="scribe", messages=HELLO, tools=TOOLS, n=3, stream=True):
        for choice in chunk.choices:
            seen[choice.index] = seen.get(choice.index, 0) + len(choice.delta.tool_calls or [])
    assert seen == {0: 1, 1: 1, 2: 1}


# ------------------------------------------------------------------------------------------------------------- forced calls
def function(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    told = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **told, **more}}


CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
ZOOM = {"type": "object", "properties": {"zoom": {"$ref": "#/$defs/Z"}}, "required": ["zoom"], "$defs": {"Z": {"enum": [1, 12]}}}
SEVERAL = [function("weather", CITY, strict=True), function("weather_map", ZOOM), function("now"), function("any", {})]
ARGUMENTS = {"weather": CITY, "weather_map": ZOOM, "now": {"maxProperties": 0}, "any": {"type": "object"}}
ASKED: dict[str, Any] = {"model": "caller", "tools": SEVERAL, "max_tokens": 120, "temperature": 2.0}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def test_tools_that_are_allowed(caller: Sdk, engine: Scripted, sdk: Sdk) -> None:
    for chosen in (("weather_map", "now"), ("now",), ("any",)):
        choice = allowed("required", *chosen)
        for seed in range(2):
            content, calls, finish = whole(caller, **ASKED, seed=seed, tool_choice=choice)
            assert content is None and finish == "tool_calls" and {name for name, _ in calls} <= set(chosen)
    assert len(whole(caller, **ASKED, seed=1, tool_choice=choice, parallel_tool_calls=False)[1]) == 1
    engine.text, engine.finish, engine.piece = called(PARIS), "stop", 3
    assert whole(sdk, tools=SEVERAL[1:] + TOOLS, tool_choice=allowed("auto", "weather", "now"))[1]
    text = engine.asked[-1].text
    assert text is not None and [tool["function"]["name"] for tool in text.tools] == ["now", "weather"] and not text.must_call
    with pytest.raises(BadRequestError, match="strict"):
        whole(caller, **ASKED, tool_choice=allowed("auto", "weather"))


def test_one_of_several_tools_is_called(caller: Sdk) -> None:
    names = set()
    for seed in range(4):
        content, calls, finish = whole(caller, **ASKED, seed=seed, tool_choice="required")
        assert streamed(caller, **ASKED, seed=seed, tool_choice="required") == (content, calls, finish)
        assert content is None and finish == "tool_calls" and calls
        for name, arguments in calls:
            jsonschema_rs.validate(ARGUMENTS[name], arguments)
        names |= {name for name, _ in calls}
    assert len(names) > 1


def test_several_are_called_if_they_may_be(caller: Sdk) -> None:
    counts = {}
    for parallel in (True, False, None):
        body = {**ASKED, "tools": [function("f")], "temperature": 0, "tool_choice": "required", "parallel_tool_calls": parallel}
        newline = {str(next(iter(byte_ids("\n")))): 90}
        counts[parallel] = len(whole(caller, **body, logit_bias=newline)[1])
    assert counts[None] == counts[True] > 1 == counts[False]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_tool_that_is_named_is_called(caller: Sdk, name: str) -> None:
    body = {**ASKED, "tool_choice": named(name)}
    ((called, arguments),) = whole(caller, **body, seed=1)[1]
    assert called == name and streamed(caller, **body, seed=1)[1] == [(called, arguments)]
    jsonschema_rs.validate(ARGUMENTS[name], arguments)


def test_forced_calls_in_each_of_several_choices(caller: Sdk) -> None:
    answer = caller(CHAT, **ASKED, messages=HELLO, n=3, seed=1, tool_choice=named("weather"), logprobs=True)
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [1, 1, 1]
    assert len({choice.message.tool_calls[0].function.arguments for choice in answer.choices}) > 1


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"tool_choice": named("wether")}, "tool_choice", "'wether': there is no such tool; did you mean 'weather'?"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type", "'custom': input should be 'function'"),
        ({"tool_choice": {"type": "function", "function": {"nme": 1, "name": "now"}}}, "tool_choice.function.nme", "unknown"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "is missing"),
        ({"tool_choice": allowed("auto", "wether")}, "tool_choice", "'wether': there is no such tool; did you mean 'weather'?"),
        ({"tool_choice": allowed("sometimes", "now")}, "tool_choice.allowed_tools.mode", "input should be 'auto' or 'required'"),
        ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "at least 1"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "is missing"),
        ({"tool_choice": "sometimes"}, "tool_choice", "'sometimes': input should be 'none', 'auto' or 'required'"),
        ({"tool_choice": "required", "stop": "x"}, "stop", "stop does not go with calls that are asked for"),
        ({"tool_choice": "required", "prediction": {"type": "content", "content": "x"}}, "prediction", "does not go with calls"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools", "tools with response_format"),
        ({"tool_choice": "required", "max_tokens": 20}, "max_tokens", "the shortest call of these tools may take"),
        ({"tool_choice": "required", "tools": [function("a"), function("a", {})]}, "tools", "several tools are called 'a'"),
        ({"tool_choice": "required", "tools": [function("a", {"properties": {"x": {"pattern": "a"}}})]}, "tools",
         "tools[0].function.parameters.x.pattern: not supported"),
        ({"tool_choice": allowed("required", "b"), "tools": [function("a"), function("b", {"type": "string"})]}, "tools",
         "tools[1].function.parameters: must be those of an object"),
        ({"tool_choice": named("b"), "tools": [function("a"), function("b", {"type": "string"})]}, "tools",
         "tools[1].function.parameters: must be those of an object"),
        ({"tools": SEVERAL, "tool_choice": "auto"}, "tools[0].function.strict", "tool_choice"),
        ({"tool_choice": "auto", "tools": [function("a")], "parallel_tool_calls": False}, "parallel_tool_calls", "required"),
        ({"tool_choice": "required", "extra_body": {"diffusion": {"algorithm": "JointThreshold"}}}, "diffusion.algorithm",
         "does not apply with calls that are asked for"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_cannot_be_asked_for_are_refused(
    caller: Sdk, body: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError) as error:
        caller(CHAT, **{**ASKED, "messages": HELLO, "stream": stream, **body})
    assert said in error.value.message and error.value.param == param, error.value.message


def test_python_asks_for_calls_too(random_model: Path) -> None:
    with DiffGenerator.from_pretrained(random_model, threads=1) as generator:
        (text,) = generator.generate("hello", tools=SEVERAL, must_call=["now"], max_tokens=200)
        assert text.text == called({"name": "now", "arguments": {}}) and text.finish_reason == "stop"
        for asked, said in (
            ({"must_call": ["now"]}, "must_call needs tools"),
            ({"must_call": "now", "tools": SEVERAL}, "must_call = 'now': must be a list"),
            ({"must_call": ["now"], "tools": SEVERAL, "schema": {}}, "must_call does not go with a schema"),
            ({"must_call": ["now"], "tools": SEVERAL, "most_calls": 0}, "most_calls = 0: must be an integer between 1 and 64"),
        ):
            with pytest.raises(InvalidRequest, match=said):
                generator.generate("hello", **asked)
