"""From words to tokens and back: the chat template, and text that is written as its tokens settle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stepwell.errors import InvalidRequest
from stepwell.types import Request

HELD_TOKENS = 8  # a character is spread over fewer tokens than these
BROKEN = "\ufffd"  # what bytes that are no whole character decode to
ROLES = {"user": "HUMAN", "assistant": "ASSISTANT", "tool": "OBSERVATION"}


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used here."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], **options: bool) -> str: ...

    def apply_chat_template(self, messages: Sequence[Any], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Codec:
    """A tokenizer with what the model says of it: the id of a mask, those that end a text, the longest text, in tokens, what a
    text has that does not say, and the number of ids."""

    tokenizer: Tokenizer
    mask: int
    ends: frozenset[int]
    context: int
    max_tokens: int
    vocabulary: int

    def prompt(self, request: Request) -> list[int]:
        """The ids that were given, or of a conversation through the checkpoint's template, or of a plain prompt."""
        text = request.text
        assert text is not None
        if text.prompt_ids:
            return list(text.prompt_ids)
        if text.messages is None:
            return self.tokenizer.encode(request.prompt, add_special_tokens=False)
        words = self._rendered([_turn(message, index) for index, message in enumerate(text.messages)], text.tools)
        return self.tokenizer.encode(words, add_special_tokens=False)

    def _rendered(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        try:
            if not self.tokenizer.chat_template:
                return rendered(turns, tools)
            words: str = self.tokenizer.apply_chat_template(
                turns, tools=list(tools) or None, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program of the checkpoint's; what it refuses is the request's fault
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}", param="messages") from None
        return words

    def encode(self, words: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(words, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def limit(self, request: Request, prompt_tokens: int) -> int:
        """The most tokens a request's text may have. Raises InvalidRequest if they do not fit behind its prompt."""
        assert request.text is not None
        asked, room = request.text.max_tokens, self.context - prompt_tokens
        param = "prompt" if request.text.messages is None else "messages"
        if room < (1 if asked is None else 0):
            raise InvalidRequest(f"{param}: {prompt_tokens} tokens; the model's context holds {self.context}", param=param)
        if asked is not None and asked > room:
            raise InvalidRequest(
                f"max_tokens = {asked}: the prompt has {prompt_tokens} tokens and the context holds {self.context}, so at "
                f"most {room} would do",
                param="max_tokens",
            )
        return min(room, self.max_tokens) if asked is None else asked


def _turn(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with its content as one string; parts that are no text are refused."""
    role, content = message.get("role"), message.get("content")
    where = f"messages[{index}]"
    if role not in ("system", "developer", *ROLES):
        raise InvalidRequest(f"{where}.role = {role!r}: must be system, developer, user, assistant or tool", param=where)
    if isinstance(content, list | tuple):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") in (None, "text")]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{where}.content: this model reads text only", param=where)
        content = "".join(str(text) for text in texts)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise InvalidRequest(f"{where}.content = {content!r}: must be a string or a list of text parts", param=where)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def rendered(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    """The template of Ling 2.0 and LLaDA2, for checkpoints that ship none."""
    system = "".join(f"{turn['content']}\n" for turn in turns[:1] if turn["role"] == "system")
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        system += (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
            f"signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\nFor each function call, return a json "
            "object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
        )
    parts = [f"<role>SYSTEM</role>{system}detailed thinking off<|role_end|>"]
    for turn in turns[1:] if turns and turns[0]["role"] == "system" else turns:
        words = turn["content"]
        if turn["role"] == "tool":
            words = f"\n<tool_response>\n{words}\n</tool_response>"
        for call in turn.get("tool_calls") or ():
            function = call.get("function", call)
            arguments = function["arguments"]
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            words += f'\n<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
        parts.append(f"<role>{ROLES.get(turn['role'], 'SYSTEM')}</role>{words}<|role_end|>")
    return "".join(parts) + "<role>ASSISTANT</role>"


@dataclass(frozen=True, slots=True)
class Writer:
    """Text as its tokens settle, in pieces that never change: characters are whole, and what may become a stop string waits.

    before: the tokens written last, which decide how the next ones are spaced; pending: those that are no whole character yet;
    held: text that may be the beginning of a stop string.
    """

    before: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    held: str = ""

    def push(self, token: int, codec: Codec, stops: Sequence[str]) -> tuple[Writer, str, bool]:
        """After one more token: the writer, what may be shown, and whether a stop string ended the text."""
        pending = (*self.pending, token)
        words = self._new(pending, codec)
        if words.endswith(BROKEN) and len(pending) < HELD_TOKENS:
            return replace(self, pending=pending), "", False
        words, is_stopped = _cut(self.held + words, stops)
        if is_stopped:
            return Writer(), words, True
        held = max((_overlap(words, stop) for stop in stops), default=0)
        shown = len(words) - held
        return Writer(pending, (), words[shown:]), words[:shown], False

    def rest(self, codec: Codec, stops: Sequence[str] = ()) -> tuple[str, bool]:
        """What was waiting, at the end of the text, and whether a stop string ended it."""
        return _cut(self.held + (self._new(self.pending, codec) if self.pending else ""), stops)

    def _new(self, pending: tuple[int, ...], codec: Codec) -> str:
        return codec.decode((*self.before, *pending))[len(codec.decode(self.before)) if self.before else 0 :]


def _cut(words: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What is before the first stop string, and whether there is one."""
    ends = [words.find(stop) for stop in stops if stop in words]
    return (words[: min(ends)], True) if ends else (words, False)


def _overlap(words: str, stop: str) -> int:
    """The length of the longest end of `words` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(words)), 0, -1) if words.endswith(stop[:n])), 0)
