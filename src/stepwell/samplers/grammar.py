"""What a text may be, as a graph of what may come next: literals that are written as they are, and values between them.

A value is written token by token and then left by one of its `exits`; a node's `instead` are the literals that may come in the
place of its values. Nothing has to begin unlike the rest: whoever goes through the graph is at several places where a text can be
read in several ways. Nodes are made when they are come to, since most graphs are far larger than a way through them; where a
value opens, what follows it is not asked for yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

DIGITS, PLACES = 15, 6  # of a number, before its point and after


class Digits(Protocol):
    """A value of digits."""

    def extra(self, written: str) -> int | None:
        """How many more characters are enough to make a value of what is written, None if it can't become one."""
        ...


@dataclass(frozen=True, slots=True)
class Branch:
    """A literal and what comes after it, None for nothing. `is_more` marks those that no text needs."""

    text: str
    next: Callable[[], Node | None]
    is_more: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A string inside its quotes, or a number."""

    exits: Callable[[], tuple[Branch, ...]]
    words: Words | None = None
    digits: Digits | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """What may come here: one of the literals, or one of the values."""

    instead: tuple[Branch, ...] = ()
    values: tuple[Value, ...] = ()


Rest = Callable[[], Node]  # what follows a value: a node of literals only
END: Node = Node((Branch("", lambda: None),))


def after(text: str, node: Node, *, is_more: bool = False) -> tuple[Branch, ...]:
    """A literal before a node, as one with each of the node's own."""
    if node.values:
        return (Branch(text, lambda: node, is_more),)
    return tuple(Branch(text + own.text, own.next, is_more or own.is_more) for own in node.instead)


def written(value: object) -> str:
    """As JSON; in ASCII where there is a lone surrogate, which is no text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if any(0xD800 <= ord(char) <= 0xDFFF for char in text) else text


class Shape(Protocol):
    """What a schema says of a value."""

    def open(self, rest: Rest) -> Node:
        """The node where it begins."""
        ...


# ---------------------------------------------------------------------------------------------------------------- shapes
@dataclass(frozen=True, slots=True)
class Words:
    """A string of so many characters."""

    least: int = 0
    most: int | None = None

    def open(self, rest: Rest) -> Node:
        inside = Node((), (Value(cache(lambda: after('"', rest())), words=self),))
        return Node((Branch('"', lambda: inside),))


@dataclass(frozen=True, slots=True)
class Number:
    """A number with at most `places` digits after its point; its bounds are counted in units of the last of them."""

    low: int
    high: int
    places: int

    def open(self, rest: Rest) -> Node:
        return Node((), (Value(cache(lambda: rest().instead), digits=self),))

    def extra(self, written: str) -> int | None:
        """As `Digits.extra`."""
        negative = written.startswith("-")
        whole, point, fraction = written[negative:].partition(".")
        is_bad = not (whole + fraction).isdigit() if whole + fraction else bool(point)
        is_long = len(whole) > DIGITS or len(fraction) > self.places or (len(whole) > 1 and whole[0] == "0")
        if is_bad or is_long or (point and not (self.places and whole)):
            return None
        low, high = (-self.high, -self.low) if negative else (self.low, self.high)
        unit = 10**self.places
        if point:
            first = int(whole) * unit + int(fraction or 0) * 10 ** (self.places - len(fraction))
            if fraction and low <= first <= high:
                return 0
            last = first + 10 ** (self.places - len(fraction)) - 1
            return max(1, self.places - len(fraction)) if first <= high and last >= low else None
        ways = list(self._longer(whole, low, high, unit))
        if not written:
            below = self.extra("-")
            ways += [] if below is None else [1 + below]
        return min(ways, default=None)

    def _longer(self, whole: str, low: int, high: int, unit: int) -> Iterator[int]:
        """The same for the magnitude of a number without a point, by the number of digits that are added before one."""
        for more in range(not whole, 1 if whole == "0" else DIGITS - len(whole) + 1):
            first, last = int(whole or 0) * 10**more, (int(whole or 0) + 1) * 10**more - 1
            if not whole and more > 1:
                first = 10 ** (more - 1)
            if max(first, -(-low // unit)) <= min(last, high // unit):
                yield more
                return
            if self.places and first * unit <= high and last * unit + unit - 1 >= low:
                yield more + 1 + self.places


ANY_NUMBER = Number(-(10 ** (DIGITS + PLACES)), 10 ** (DIGITS + PLACES), PLACES)


@dataclass(frozen=True, slots=True)
class Values:
    """One of these, as they are written: numbers, and everything else."""

    numbers: tuple[str, ...]
    others: tuple[str, ...]

    def extra(self, written: str) -> int | None:
        """As `Digits.extra`."""
        return min((len(each) - len(written) for each in self.numbers if each.startswith(written)), default=None)

    def open(self, rest: Rest) -> Node:
        instead = tuple(Branch(text, rest) for text in self.others)
        return Node(instead, (Value(cache(lambda: rest().instead), digits=self),) if self.numbers else ())


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of several."""

    shapes: tuple[Shape, ...]

    def open(self, rest: Rest) -> Node:
        nodes = [shape.open(rest) for shape in self.shapes]
        instead = tuple(branch for node in nodes for branch in node.instead)
        return Node(instead, tuple(value for node in nodes for value in node.values))


@dataclass(frozen=True, slots=True)
class Items:
    item: Shape
    least: int
    most: int

    def open(self, rest: Rest) -> Node:
        @cache
        def more(count: int) -> Node:
            """After so many items."""
            end = after("]", rest()) if count >= self.least else ()
            return Node((*(after(", ", item(count), is_more=count >= self.least) if count < self.most else ()), *end))

        def item(count: int) -> Node:
            return self.item.open(lambda: more(count + 1))

        if not self.most:
            return Node((Branch("[]", rest),))
        if self.least:
            return Node(after("[", item(0)))
        first = item(0)
        begun = tuple(Branch(branch.text, branch.next, is_more=True) for branch in first.instead)
        return Node(after("[", Node((*begun, Branch("]", rest)), first.values)))


@dataclass(frozen=True, slots=True)
class Fields:
    """An object: (name, shape, whether it must be there) each, in this order."""

    fields: tuple[tuple[str, Shape, bool], ...]

    def open(self, rest: Rest) -> Node:
        @cache
        def value(at: int) -> Node:
            return self.fields[at][1].open(lambda: left(at + 1))

        @cache
        def left(begin: int, before: str = ", ") -> Node:
            """Where the fields from `begin` on may come."""
            branches: list[Branch] = []
            for at in range(begin, len(self.fields)):
                name, _, is_required = self.fields[at]
                branches += after(f"{before}{written(name)}: ", value(at), is_more=not is_required)
                if is_required:
                    return Node(tuple(branches))
            return Node((*branches, *((Branch("{}", rest),) if before == "{" else after("}", rest()))))

        return left(0, "{")


@dataclass(frozen=True, slots=True)
class Entries:
    """An object of any names, whose values are of one shape."""

    value: Shape

    def open(self, rest: Rest) -> Node:
        def name() -> Node:
            exits = cache(lambda: after('": ', self.value.open(cache(more))))
            return Node((), (Value(exits, words=Words(1)),))

        def more() -> Node:
            return Node((Branch(', "', cache(name), is_more=True), *after("}", rest())))

        return Node((Branch('{"', cache(name), is_more=True), Branch("{}", rest)))


@dataclass(frozen=True, slots=True)
class Free:
    """Anything; of arrays and objects at most `depth` within each other."""

    depth: int

    def open(self, rest: Rest) -> Node:
        inner = Free(self.depth - 1)
        plain = OneOf((ANY_NUMBER, Words(), Values((), ("true", "false", "null")))).open(rest)
        if not self.depth:
            return plain
        nodes = (Items(inner, 0, 64).open(rest), Entries(inner).open(rest))
        more = tuple(Branch(branch.text, branch.next, is_more=True) for node in nodes for branch in node.instead)
        return Node((*plain.instead, *more), plain.values)
