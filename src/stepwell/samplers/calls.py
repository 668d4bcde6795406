"""Calls of tools that a text has to make, written as the templates of Ling and LLaDA2 have them:
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, each on lines of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from stepwell.errors import InvalidRequest
from stepwell.samplers.grammar import Branch, Fields, Node, OneOf, Rest, Shape, Values, after, written
from stepwell.samplers.schema import object_of

BEGIN, END = "<tool_call>", "</tool_call>"
MOST_CALLS = 64


@dataclass(frozen=True, slots=True)
class Calls:
    """One call, or several one below the other, at most so many."""

    call: Shape
    most: int

    def open(self, rest: Rest) -> Node:
        def call(count: int) -> Node:
            return self.call.open(lambda: ended(count + 1))

        @cache
        def ended(count: int) -> Node:
            """After so many, the tag of the last one being left."""
            more = after(f"\n{BEGIN}\n", call(count), is_more=True) if count < self.most else ()
            behind = Node((*rest().instead, *more))
            return Node((Branch(f"\n{END}", lambda: behind),))

        return Node(after(f"{BEGIN}\n", call(0)))


def calls_of(tools: Sequence[Mapping[str, Any]], names: Sequence[str], most: int) -> Shape:
    """At most so many calls of the tools with these names, whose arguments are what their parameters say. Raises InvalidRequest
    or Unsupported, naming the tool."""
    functions = [tool.get("function", tool) for tool in tools]
    every = [function.get("name") for function in functions]
    shapes: list[Shape] = []
    for name in dict.fromkeys(names):
        if every.count(name) != 1:
            said = f"several tools are called {name!r}" if name in every else f"there is no tool {name!r}"
            raise InvalidRequest(f"tools: {said}", param="tools")
        at = every.index(name)
        arguments = _arguments(functions[at].get("parameters"), f"tools[{at}].function.parameters")
        shapes.append(Fields((("name", Values((), (written(name),)), True), ("arguments", arguments, True))))
    return Calls(OneOf(tuple(shapes)), most)


def _arguments(parameters: Any, where: str) -> Shape:
    """None are parameters of a function without any."""
    if parameters is None:
        return Fields(())
    try:
        return object_of(parameters)
    except InvalidRequest as error:
        raise type(error)(where + error.message.removeprefix("schema"), param="tools") from None
