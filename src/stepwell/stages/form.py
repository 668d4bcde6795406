"""Text that a grammar holds to: literals are written at once, and values from left to right as far as the model is sure of them.

The literals ahead of a value are in the canvas before the model sees it. What follows a value is not, as nobody knows how
long it will be, and a model takes the number of masks for the length; but where the model itself expects what follows, one
forward goes on through it, into the next values. A choice among literals is made as a whole: the probability of each is the
product over its tokens, each among those that may stand there. A text that can be read in several ways, as one alternative or
another of a schema, is at several places of the grammar until one of its tokens tells them apart. What is left of the token
limit is enough at any time to write the shortest end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepwell.errors import InvalidRequest, Unsupported
from stepwell.samplers.grammar import END, Branch, Digits, Node, Shape, Value
from stepwell.stages.tokens import BROKEN, Codec

PLAIN = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])+')
ESCAPED = frozenset('"\\/bfnrt')
MOST_NODES = 5_000  # of the shortest end that there is anywhere
LEAST = -1e9  # stands for the log-probability of what the model holds impossible
NUMERIC = re.compile(r"[-+.eE0-9]*", re.ASCII)  # exponents are in some values of an enum
Option = tuple[tuple[int, ...], Branch]


class Vocabulary:
    """What each token writes after others, and which may stand in a string or a number."""

    def __init__(self, codec: Codec, device: str):
        self.codec = codec
        self.end = min(codec.ends, default=codec.mask)  # stands for the end of a text that has no other sign of it
        self._before = codec.encode('"')[-1:]
        self._skipped = len(codec.decode(self._before))
        self._spelled: dict[str, tuple[int, ...]] = {}
        pieces = [self.after(i) for i in range(codec.vocabulary)]
        for i in codec.ends | {codec.mask}:
            pieces[i] = ""
        self.pieces = [piece if BROKEN not in piece else "" for piece in pieces]
        matches = [PLAIN.fullmatch(piece) for piece in self.pieces]
        lengths = [len(re.sub(r"\\.", "x", match[0])) if match else 0 for match in matches]
        self.lengths = torch.tensor(lengths, device=device)  # characters of a string, 0 where a token can't be in one
        self.plain = self.lengths > 0
        self.backslashes = [i for i, piece in enumerate(self.pieces) if piece == "\\"]
        self.escaped = [i for i, piece in enumerate(self.pieces) if piece in ESCAPED]
        self.digits = [i for i, piece in enumerate(self.pieces) if piece and NUMERIC.fullmatch(piece)]
        self._longest = max(map(len, self.pieces))
        self._ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces))) if piece}

    def only(self, ids: Sequence[int]) -> Tensor:
        """(vocabulary,) bool, true for these"""
        made = torch.zeros_like(self.plain)
        made[list(ids)] = True
        return made

    def after(self, *ids: int) -> str:
        """What tokens write where they do not begin a text."""
        return self.codec.decode((*self._before, *ids))[self._skipped :]

    def spell(self, text: str) -> tuple[int, ...]:
        """A literal's tokens: the tokenizer's, if they write it, or else the longest there are. Raises Unsupported."""
        if text not in self._spelled:
            ids = self.codec.encode(text) if text else (self.end,)
            if text and (self.after(*ids) != text or not self.codec.ends.isdisjoint(ids)):
                ids, at = (), 0
                while at < len(text):
                    sizes = range(min(self._longest, len(text) - at), 0, -1)
                    size = next((size for size in sizes if text[at : at + size] in self._ids), 0)
                    if not size:
                        raise Unsupported(f"schema: the tokenizer has no token for {text[at]!r}", param="schema")
                    ids, at = (*ids, self._ids[text[at : at + size]]), at + size
            self._spelled[text] = ids
        return self._spelled[text]


class Grammar:
    """A shape in tokens: what may follow what, and how much the shortest end takes."""

    def __init__(self, shape: Shape, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.root = shape.open(lambda: END)
        self._needs: dict[Node, int] = {}
        self._extras: dict[tuple[Digits, str], list[tuple[int, int]]] = {}

    def need(self, root: Node) -> int:
        """The fewest tokens from a node to the end, taking a character of a value for a token."""
        stack, known = [root], len(self._needs)
        while stack:
            if len(self._needs) - known + len(stack) > MOST_NODES:
                raise InvalidRequest(f"schema: its shortest text has more than {MOST_NODES} parts", param="schema")
            node = stack[-1]
            ways = [b for b in (*node.instead, *(b for value in node.values for b in value.exits())) if not b.is_more]
            missing = [after for b in ways if (after := b.next()) is not None and after not in self._needs]
            if node in self._needs or not missing:
                stack.pop()
                self._needs[node] = min(
                    [self.cost(b) for b in node.instead if not b.is_more]
                    + [self._least(value) + self.leave(value) for value in node.values]
                )
            stack += missing
        return self._needs[root]

    def _least(self, value: Value) -> int:
        if value.words is not None:
            return value.words.least
        extra = value.digits.extra("") if value.digits else 0
        assert extra is not None
        return extra

    def extras(self, digits: Digits, written: str) -> list[tuple[int, int]]:
        """The tokens that may go on with a number, and how many more characters are enough after each."""
        if (digits, written) not in self._extras:
            pieces = self.vocabulary.pieces
            after = ((i, digits.extra(written + pieces[i])) for i in self.vocabulary.digits)
            self._extras[digits, written] = [(i, extra) for i, extra in after if extra is not None]
        return self._extras[digits, written]

    def cost(self, branch: Branch) -> int:
        """Tokens from a branch to the end."""
        after = branch.next()
        spelled = len(self.vocabulary.spell(branch.text)) if branch.text else 0
        return spelled + (0 if after is None else self._needs[after] if after in self._needs else self.need(after))

    def leave(self, value: Value) -> int:
        """Tokens from the end of a value to the end."""
        return min(self.cost(b) for b in value.exits() if not b.is_more)

    def options(self, branches: Sequence[Branch], left: int) -> tuple[Option, ...]:
        """Those that `left` tokens are enough for."""
        return tuple((self.vocabulary.spell(b.text), b) for b in branches if self.cost(b) <= left)


@dataclass(frozen=True, slots=True)
class Reading:
    """One forward's opinion on the masks of a block. logs: (masks, vocabulary) log-probabilities; pick: of log-probabilities,
    -inf for what may not be, and the mask they are for, the place of the one to take."""

    logs: Tensor
    threshold: float
    pick: Callable[[Tensor, int], int]

    def at(self, mask: int) -> Tensor:
        return self.logs[mask].nan_to_num(nan=LEAST, neginf=LEAST)

    def is_sure(self, mask: int, token: int) -> bool:
        return mask < len(self.logs) and math.exp(self.logs[mask, token].item()) > self.threshold


@dataclass(frozen=True, slots=True)
class Begun:
    """A value that is being written.

    number: what is written of it; chars: of a string, how many characters, and whether the next one is escaped.
    """

    value: Value
    number: str = ""
    chars: int = 0
    is_escaped: bool = False

    def exits(self, grammar: Grammar, left: int) -> tuple[Option, ...]:
        """The literals that may end it now."""
        words, digits = self.value.words, self.value.digits
        is_whole = words is not None and not self.is_escaped and self.chars >= words.least
        if is_whole or (digits is not None and digits.extra(self.number) == 0):
            return grammar.options(self.value.exits(), left)
        return ()

    def goes_on(self, grammar: Grammar, left: int) -> Tensor:
        """Which tokens may go on with it. (vocabulary,) bool"""
        words, digits, vocabulary = self.value.words, self.value.digits, grammar.vocabulary
        spare = left - 1 - grammar.leave(self.value)
        if digits is not None:
            return vocabulary.only([i for i, extra in grammar.extras(digits, self.number) if extra <= spare])
        assert words is not None
        if self.is_escaped:
            return vocabulary.only(vocabulary.escaped)
        room = math.inf if words.most is None else words.most - self.chars
        if spare < 0 or room < 1:
            return vocabulary.only(())
        lacking = words.least - self.chars - spare
        allowed = vocabulary.plain & (vocabulary.lengths <= room) if room < math.inf else vocabulary.plain
        allowed = allowed & (vocabulary.lengths >= lacking) if lacking > 1 else allowed
        has_escape = spare >= 1 + max(0, words.least - self.chars - 1)  # a backslash, and what it is before
        return allowed | vocabulary.only(vocabulary.backslashes) if has_escape else allowed

    def with_(self, token: int, vocabulary: Vocabulary) -> Begun:
        """After one of the tokens that may go on with it."""
        if self.value.digits is not None:
            return replace(self, number=self.number + vocabulary.pieces[token])
        chars = self.chars + (1 if self.is_escaped else int(vocabulary.lengths[token]))
        return replace(self, chars=chars, is_escaped=not self.is_escaped and token in vocabulary.backslashes)


@dataclass(frozen=True, slots=True)
class Form:
    """How far a text has come, with `left` tokens to go. Where it can be read in several ways it is at several places: before
    what is left of some `options`, and in some values that are `begun`. Each of them has tokens enough to its end."""

    grammar: Grammar
    left: int
    options: tuple[Option, ...] = ()
    begun: tuple[Begun, ...] = ()
    is_ended: bool = False

    @classmethod
    def of(cls, grammar: Grammar, limit: int) -> Form:
        """Before the first of `limit` tokens."""
        return cls(grammar, limit)._at([grammar.root])

    def _at(self, nodes: Iterable[Node | None]) -> Form:
        """With the nodes that it has come to; None is the end."""
        options, begun = self.options, self.begun
        for node in nodes:
            if node is None:
                return replace(self, options=(), begun=(), is_ended=True)
            options += self.grammar.options(node.instead, self.left)
            begun += tuple(map(Begun, node.values))
        return replace(self, options=tuple(dict.fromkeys(options)), begun=tuple(dict.fromkeys(begun)))

    def _with(self, token: int, going: Sequence[Begun] = ()) -> Form:
        """After a token, which goes on with some of the values."""
        vocabulary = self.grammar.vocabulary
        taken = [(ids[1:], branch) for ids, branch in self._ways() if ids[0] == token]
        options = tuple(option for option in taken if option[0])
        begun = tuple(each.with_(token, vocabulary) for each in going)
        form = Form(self.grammar, self.left - (token != vocabulary.end), options, begun)
        return form._at(branch.next() for ids, branch in taken if not ids)

    def _ways(self) -> tuple[Option, ...]:
        """The literals that may come now."""
        exits = (option for each in self.begun for option in each.exits(self.grammar, self.left))
        return tuple(dict.fromkeys((*self.options, *exits)))

    def _going(self) -> list[tuple[Begun, Tensor]]:
        """The values that may go on, and with which tokens."""
        each = ((begun, begun.goes_on(self.grammar, self.left)) for begun in self.begun)
        return [(begun, tokens) for begun, tokens in each if tokens.any()]

    def filled(self, reading: Reading) -> tuple[list[tuple[int, float | None]], Form]:
        """The next tokens, one at least, with the log-probability of those that were chosen; and where they lead."""
        form, made, is_sure = self, list[tuple[int, float | None]](), True
        while is_sure and not form.is_ended and len(made) < len(reading.logs):
            chosen, form = form._chosen(reading, len(made))
            for token in chosen:
                is_sure = is_sure and reading.is_sure(len(made), token)
                made.append((token, reading.logs[len(made), token].item()))
            forced, form = form.forced()
            for token in forced:
                is_sure = is_sure and reading.is_sure(len(made), token)
                made.append((token, None))
        return made, form

    def forced(self) -> tuple[list[int], Form]:
        """All that can be written in one way only, and where that leads."""
        form, tokens = self, list[int]()
        while not form.is_ended and not form._going():
            heads = {ids[0] for ids, _ in form._ways()}
            if len(heads) > 1:
                break
            form = form._with(token := heads.pop())
            tokens += [token] * (token != self.grammar.vocabulary.end)
        return tokens, form

    def _chosen(self, reading: Reading, mask: int) -> tuple[list[int], Form]:
        """What is taken where there are several ways."""
        vocabulary, going, ways, form = self.grammar.vocabulary, self._going(), self._ways(), self
        if going:
            allowed = vocabulary.only([ids[0] for ids, _ in ways])
            for _, tokens in going:
                allowed = allowed | tokens
            token = reading.pick(reading.at(mask).masked_fill(~allowed, -torch.inf), mask)
            form = form._with(token, [begun for begun, tokens in going if tokens[token]])
            return [token] * (token != vocabulary.end), form
        scores = _scores(ways, reading, mask)
        best = list(scores)[reading.pick(reading.logs.new_tensor(list(scores.values())), mask)]
        for token in best:
            form = form._with(token)
        return [token for token in best if token != vocabulary.end], form


def _scores(options: Sequence[Option], reading: Reading, mask: int) -> dict[tuple[int, ...], float]:
    """The log-probability of what each option has at this mask and the following ones, as far as there are some; of those that
    begin with another one, as far as that one goes."""
    scores: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], tuple[float, list[tuple[int, ...]]]] = {(): (0.0, [ids for ids, _ in options])}
    for depth in range(len(reading.logs) - mask + 1):
        following: dict[tuple[int, ...], tuple[float, list[tuple[int, ...]]]] = {}
        for done, (score, members) in open_.items():
            if mask + depth == len(reading.logs) or any(len(ids) == depth for ids in members):
                scores[done] = score
                continue
            tails: dict[int, list[tuple[int, ...]]] = {}
            for ids in members:
                tails.setdefault(ids[depth], []).append(ids)
            logs = reading.at(mask + depth)[list(tails)].log_softmax(-1).tolist()
            for (token, own), log in zip(tails.items(), logs, strict=True):
                following[(*done, token)] = score + log, own
        open_ = following
    return scores
