"""Calls of tools: told of through the template, and read out of what the model writes, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

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
