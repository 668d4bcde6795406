"""Calls of tools in a text, as the templates of Ling and LLaDA2 have them written:
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json
import uuid
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


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
        content, calls = "", []
        while END in self._held.partition(BEGIN)[2]:
            before, _, rest = self._held.partition(BEGIN)
            inner, _, self._held = rest.partition(END)
            call = self._call(inner)
            content += before.rstrip() if call else f"{before}{BEGIN}{inner}{END}"
            calls += [call] if call else []
        certain = self._held[: _begins(self._held)].rstrip()
        self._held = self._held[len(certain) :]
        return content + certain, calls

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back: a call that only lacks its end tag is one."""
        before, begin, inner = self._held.partition(BEGIN)
        call = self._call(inner) if begin else None
        rest = before.rstrip() if call else self._held
        self._held = ""
        return "" if self.count and not rest.strip() else rest, [call] if call else []

    def _call(self, inner: str) -> dict[str, Any] | None:
        try:
            call = json.loads(inner)
            name, arguments = call["name"], call.get("arguments") or {}
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        words = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self.count += 1
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": words}}


def _begins(text: str) -> int:
    """Where the first tag begins, or what may become one."""
    found = text.find(BEGIN)
    if found >= 0:
        return found
    return next((at for at in range(max(0, len(text) - len(BEGIN)), len(text)) if BEGIN.startswith(text[at:])), len(text))
