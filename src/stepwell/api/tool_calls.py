"""Reads the calls of tools out of a text; `samplers.calls` says how they are written."""

from __future__ import annotations

import json
import uuid
from typing import Any

from stepwell.samplers.calls import BEGIN, END
from stepwell.samplers.grammar import written


class ToolCallReader:
    """Takes a text apart as it comes: content that is certain to be no call, and calls that are whole.

    What looks like a call and is none stays content. White space before a call and after the last one is not content.
    """

    def __init__(self) -> None:
        self.count = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """More of the text: the content and the calls that it makes certain."""
        self._held += text
        content, calls = self._take(is_last=False)
        certain = self._held[: _begins(self._held)].rstrip()
        self._held = self._held[len(certain) :]
        return content + certain, calls

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back: a call that only lacks its end tag is one."""
        content, calls = self._take(is_last=True)
        rest, self._held = content + self._held, ""
        return "" if self.count and not rest.strip() else rest, calls

    def _take(self, *, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Content and calls up to the last call of which all is there."""
        content, calls = "", []
        while BEGIN in self._held and (is_last or END in self._held.partition(BEGIN)[2]):
            before, _, inner = self._held.partition(BEGIN)
            found = _read(inner, is_last=is_last)
            if found is None:
                break
            call, self._held = found
            content += f"{before}{BEGIN}" if call is None else before.rstrip()
            calls += [] if call is None else [call]
        self.count += len(calls)
        return content, calls


def _read(inner: str, *, is_last: bool) -> tuple[dict[str, Any] | None, str] | None:
    """The call that a tag opens, or none, and the text behind it; None where more of the text decides. JSON says itself where
    it ends: its strings may hold the end tag too."""
    text = inner.lstrip()
    try:
        call, end = json.JSONDecoder().raw_decode(text)
        name, arguments = call["name"], call.get("arguments") or {}
        words = arguments if isinstance(arguments, str) else written(arguments)
        (name + words).encode()  # a lone surrogate is no text
    except json.JSONDecodeError as error:
        may_go_on = error.msg.startswith("Unterminated string") or END not in text[error.pos :]
        return None if may_go_on and not is_last else (None, inner)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, inner
    rest = text[end:].lstrip()
    if not rest.startswith(END):
        if not END.startswith(rest):
            return None, inner
        if not is_last:
            return None
    function = {"name": name, "arguments": words}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}, rest[len(END) :]


def _begins(text: str) -> int:
    """Where the first tag begins, or what may become one."""
    found = text.find(BEGIN)
    if found >= 0:
        return found
    return next((at for at in range(max(0, len(text) - len(BEGIN)), len(text)) if BEGIN.startswith(text[at:])), len(text))
