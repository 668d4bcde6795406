"""The Chat Completions API (`POST /v1/chat/completions`) as the openai SDK speaks it."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from stepwell.api.body import Body, Models, parse_body
from stepwell.api.texts import Answer, TextBody, answer_of, bytes_of, finish_of, logprob_of, pick_text_model
from stepwell.api.tool_calls import ToolCallReader
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.samplers.calls import MOST_CALLS, calls_of
from stepwell.samplers.schema import shape_of
from stepwell.types import Output, Request, TokenInfo, replace


class CalledFunction(Body):
    """A function with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """A turn of a conversation; content may come in parts of type text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="For templates that know it.")
    refusal: str | None = Field(None, description="No effect.")
    annotations: list[dict[str, Any]] | None = Field(None, description="No effect.")
    audio: None = None
    function_call: None = None


class Function(Body):
    """What the model may call; parameters are a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="True only where a call is asked for: its arguments are held to the schema.")


class Tool(Body):
    """A function the model is told of."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Which function."""

    name: str


class NamedTool(Body):
    """The function that has to be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Body):
    """Of the tools, those that may be called, and whether one has to be."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(Body):
    """The same, as a `tool_choice`."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


def _kind_of(choice: object) -> str:
    """Which of the kinds of `tool_choice` it is, for what is wrong with it to be told of that one only."""
    if isinstance(choice, AllowedTools) or (isinstance(choice, dict) and choice.get("type") == "allowed_tools"):
        return "dict[allowed]"
    return "dict[]" if isinstance(choice, dict | NamedTool) else "str"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")]
    | Annotated[NamedTool, Tag("dict[]")]
    | Annotated[AllowedTools, Tag("dict[allowed]")],
    Discriminator(_kind_of),
]


class JsonSchema(Body):
    """What JSON the text has to be."""

    name: str | None = None
    description: str | None = Field(None, description="No effect: say in the messages what is wanted.")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="No effect: the text always satisfies the schema.")


class ResponseFormat(Body):
    """What the text has to be: anything, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """What `TextParams` calls the schema."""
        name = "response_format.json_schema"
        if self.type == "json_schema" and self.json_schema is None:
            raise InvalidRequest(f"{name} is missing", param=name)
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidRequest(f"{name} goes with type = 'json_schema', not {self.type!r}", param=name)
        if self.json_schema is None:
            return {} if self.type == "json_object" else None
        try:
            shape_of(self.json_schema.schema_)
        except InvalidRequest as error:
            raise type(error)(f"{name}.{error.message}", param=name) from None
        return self.json_schema.schema_


class Prediction(Body):
    """What the text is expected to be."""

    type: Literal["content"]
    content: str | list[dict[str, Any]]

    def words(self) -> str:
        parts = [{"type": "text", "text": self.content}] if isinstance(self.content, str) else self.content
        texts = [part["text"] for part in parts if part.keys() == {"type", "text"} and part["type"] == "text"]
        if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest("prediction.content: must be a string or a list of text parts", param="prediction.content")
        return "".join(texts)


class ChatBody(TextBody):
    """A conversation whose next turn is asked for."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Whether required calls may be several; yes, if left out.")
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        match self.tool_choice:
            case "none":
                return ()
            case AllowedTools():
                return tuple(tool for tool in self.tools or () if tool.function.name in self.chosen)
        return tuple(self.tools or ())

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of tools that `tool_choice` has."""
        match self.tool_choice:
            case NamedTool(function=function):
                return (function.name,)
            case AllowedTools(allowed_tools=allowed):
                return tuple(tool.function.name for tool in allowed.tools)
        return ()

    @property
    def must_call(self) -> tuple[str, ...]:
        """Names of tools of which one has to be called."""
        match self.tool_choice:
            case "required" | AllowedTools(allowed_tools=Allowed(mode="required")):
                return tuple(tool.function.name for tool in self.offered)
        return self.chosen if isinstance(self.tool_choice, NamedTool) else ()

    @property
    def most_calls(self) -> int:
        """How many of those."""
        is_one = isinstance(self.tool_choice, NamedTool) or self.parallel_tool_calls is False
        return MOST_CALLS if self.must_call and not is_one else 1


def to_answer(body: Any, models: Models) -> Answer:
    """A JSON body as a request, still to be completed, and the answer to it. Raises InvalidRequest, Unsupported or
    ModelNotFound, naming the field."""
    parsed = parse_body(ChatBody, body)
    model = pick_text_model(parsed, models)
    _refuse(parsed)
    if None not in (parsed.max_tokens, parsed.max_completion_tokens) and parsed.max_tokens != parsed.max_completion_tokens:
        raise InvalidRequest(
            f"max_completion_tokens = {parsed.max_completion_tokens} contradicts max_tokens = {parsed.max_tokens}; give one of "
            "them", param="max_completion_tokens",
        )  # fmt: skip
    if parsed.top_logprobs and not parsed.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs = true", param="top_logprobs")
    tools = tuple(tool.model_dump(exclude_none=True) for tool in parsed.offered)
    text = replace(
        parsed.text(),
        messages=tuple(turn.model_dump(exclude_none=True, exclude={"refusal", "annotations"}) for turn in parsed.messages),
        tools=tools,
        must_call=parsed.must_call,
        most_calls=parsed.most_calls,
        max_tokens=parsed.max_completion_tokens if parsed.max_tokens is None else parsed.max_tokens,
        prediction=None if parsed.prediction is None else parsed.prediction.words(),
        schema=None if parsed.response_format is None else parsed.response_format.schema_of(),
        logprobs=(parsed.top_logprobs or 0) if parsed.logprobs else None,
    )
    request = Request("", parsed.sampling(), id=f"chatcmpl-{uuid.uuid4().hex[:24]}", model=model.id, text=text)
    return answer_of(parsed, [request], ChatShape(reads_calls=bool(tools), tells=bool(parsed.logprobs)), models)


def _refuse(parsed: ChatBody) -> None:
    """What is not honoured."""
    names = [tool.function.name for tool in parsed.tools or ()]
    if parsed.tool_choice not in (None, "none") and not names:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    for name in parsed.chosen:
        if name not in names:
            near = difflib.get_close_matches(name[:100], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"tool_choice = {name[:100]!r}: there is no such tool{hint}", param="tool_choice")
    if not parsed.must_call and parsed.parallel_tool_calls is False:
        raise Unsupported(
            "parallel_tool_calls = False: the model decides how many calls it makes; leave it out, or ask for one by "
            "tool_choice = 'required'", param="parallel_tool_calls",
        )  # fmt: skip
    strict = next((i for i, tool in enumerate(parsed.tools or ()) if tool.function.strict and tool in parsed.offered), None)
    if strict is not None and not parsed.must_call:
        field = f"tools[{strict}].function.strict"
        raise Unsupported(
            f"{field} = True: arguments are held to the schema where a call is asked for, by tool_choice = 'required' or a "
            "function; leave it out", param=field,
        )  # fmt: skip
    if parsed.offered and parsed.response_format and parsed.response_format.type != "text":
        raise Unsupported(
            "tools with response_format: a text held to a schema can't call any; use tool_choice = 'none'", param="tools"
        )
    if parsed.must_call:  # here, where a tool's index is still the client's
        calls_of([tool.model_dump() for tool in parsed.tools or ()], parsed.must_call, parsed.most_calls)


class ChatShape:
    """Writes choices as messages, with the calls of tools taken out if any were offered."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(self, *, reads_calls: bool, tells: bool):
        self._reads_calls, self._tells = reads_calls, tells
        self._readers: dict[int, ToolCallReader] = {}

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        result = output.text
        assert result is not None
        content = result.text
        calls: list[dict[str, Any]] = []
        if self._reads_calls:
            reader = ToolCallReader()
            (first, calls), (rest, more) = reader.push(content), reader.end()
            content, calls = first + rest, calls + more
        message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        return {
            "index": index,
            "message": {**message, **({"tool_calls": calls} if calls else {})},
            "logprobs": self._logprobs(result.tokens),
            **_finish(output, called=bool(calls)),
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [_part(index, {"role": "assistant", "content": "", "refusal": None}, None)]

    def delta(self, index: int, text: str, tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
        if not self._reads_calls:
            return [_part(index, {"content": text}, self._logprobs(tokens))]
        reader = self._readers.setdefault(index, ToolCallReader())
        return self._taken_apart(index, reader.count, reader.push(text), tokens)

    def empty(self, index: int) -> dict[str, Any]:
        return _part(index, {}, None)

    def ending(self, index: int, output: Output) -> list[dict[str, Any]]:
        reader = self._readers.get(index, ToolCallReader())
        parts = self._taken_apart(index, reader.count, reader.end(), ())
        return [*parts, {**self.empty(index), **_finish(output, called=reader.count > 0)}]

    def _taken_apart(
        self, index: int, count: int, found: tuple[str, list[dict[str, Any]]], tokens: Sequence[TokenInfo]
    ) -> list[dict[str, Any]]:
        """Content and calls, of which there were `count` before, as one event if there is anything to say."""
        content, calls = found
        if not content and not calls and not tokens:
            return []
        delta: dict[str, Any] = {"content": content} if content or not calls else {}
        if calls:
            delta["tool_calls"] = [{"index": count + place, **call} for place, call in enumerate(calls)]
        return [_part(index, delta, self._logprobs(tokens))]

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        return {"content": [_token(token) for token in tokens], "refusal": None} if self._tells else None


def _part(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _finish(output: Output, *, called: bool) -> dict[str, Any]:
    found = finish_of(output)
    return {**found, "finish_reason": "tool_calls"} if called and found["finish_reason"] == "stop" else found


def _token(token: TokenInfo) -> dict[str, Any]:
    return {
        **_likely(token.text, token.logprob),
        "top_logprobs": [_likely(text, logprob) for _, text, logprob in token.top],
        "commit_step": token.step,
    }


def _likely(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob_of(logprob), "bytes": bytes_of(text)}
