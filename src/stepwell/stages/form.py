"""Text that a grammar holds to: literals are written at once, and values from left to right as far as the model is sure of them.

The literals ahead of a value are in the canvas before the model sees it. What follows a value is not, as nobody knows how
long it will be, and a model takes the number of masks for the length; but where the model itself expects what follows, one
forward goes on through it, into the next values. A choice among literals is made as a whole: the probability of each is the
product over its tokens, each among those that may stand there. What is left of the token limit is enough at any time to
write the shortest end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepwell.errors import InvalidRequest, Unsupported
from stepwell.samplers.grammar import END, Branch, Digits, Node, Shape
from stepwell.stages.tokens import BROKEN, Codec

PLAIN = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])+')
ESCAPED = frozenset('"\\/bfnrt')
MOST_NODES = 5_000  # of a schema's shortest text
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
        stack = [root]
        while stack:
            if len(self._needs) + len(stack) > MOST_NODES:
                raise InvalidRequest(f"schema: its shortest text has more than {MOST_NODES} parts", param="schema")
            node = stack[-1]
            ways = [b for b in (*node.instead, *(node.exits() if node.has_value else ())) if not b.is_more]
            missing = [after for b in ways if (after := b.next()) is not None and after not in self._needs]
            if node in self._needs or not missing:
                stack.pop()
                self._needs[node] = min(
                    [self.cost(b) for b in node.instead if not b.is_more]
                    + ([self._least(node) + self.leave(node)] if node.has_value else [])
                )
            stack += missing
        return self._needs[root]

    def _least(self, node: Node) -> int:
        if node.words is not None:
            return node.words.least
        extra = node.digits.extra("") if node.digits else 0
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

    def leave(self, node: Node) -> int:
        """Tokens from the end of a node's value to the end."""
        return min(self.cost(b) for b in node.exits() if not b.is_more)

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
class Form:
    """How far a text has come: at `node`, None at the end, with `left` tokens to go; and there either in its value, or `begun`
    tokens into some options.

    number: what is written of it; chars: of a string, how many characters, and whether the next one is escaped.
    """

    grammar: Grammar
    node: Node | None
    left: int
    number: str = ""
    chars: int = 0
    is_escaped: bool = False
    options: tuple[Option, ...] = ()
    begun: int = 0

    def filled(self, reading: Reading) -> tuple[list[tuple[int, float | None]], Form]:
        """The next tokens, one at least, with the log-probability of those that were chosen; and where they lead."""
        form, made, is_sure = self, list[tuple[int, float | None]](), True
        while is_sure and form.node is not None and len(made) < len(reading.logs):
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
        while form.node is not None:
            if not form.options:
                if form.node.has_value and form._values().any():
                    break
                form = replace(form, options=form._ways())
            heads = {ids[form.begun] for ids, _ in form.options}
            if len(heads) > 1:
                break
            form = form._with((token := heads.pop(),))
            tokens += [token] * (token != self.grammar.vocabulary.end)
        return tokens, form

    def _ways(self) -> tuple[Option, ...]:
        """The literals that may come now."""
        node, is_new = self.node, not (self.number or self.chars or self.is_escaped)
        assert node is not None
        branches = node.instead if is_new else ()
        is_whole = node.words is not None and not self.is_escaped and self.chars >= node.words.least
        if is_whole or (node.digits is not None and node.digits.extra(self.number) == 0):
            branches = (*branches, *node.exits())
        return self.grammar.options(branches, self.left)

    def _values(self) -> Tensor:
        """Which tokens may go on with the value. (vocabulary,) bool"""
        node, vocabulary = self.node, self.grammar.vocabulary
        assert node is not None
        spare = self.left - 1 - self.grammar.leave(node)
        if node.digits is not None:
            return vocabulary.only([i for i, extra in self.grammar.extras(node.digits, self.number) if extra <= spare])
        assert node.words is not None
        if self.is_escaped:
            return vocabulary.only(vocabulary.escaped)
        room = math.inf if node.words.most is None else node.words.most - self.chars
        if spare < 0 or room < 1:
            return vocabulary.only(())
        lacking = node.words.least - self.chars - spare
        allowed = vocabulary.plain & (vocabulary.lengths <= room) if room < math.inf else vocabulary.plain
        allowed = allowed & (vocabulary.lengths >= lacking) if lacking > 1 else allowed
        has_escape = spare >= 1 + max(0, node.words.least - self.chars - 1)  # a backslash, and what it is before
        return allowed | vocabulary.only(vocabulary.backslashes) if has_escape else allowed

    def _chosen(self, reading: Reading, mask: int) -> tuple[list[int], Form]:
        """What is taken where there are several ways."""
        vocabulary = self.grammar.vocabulary
        if self.options:
            scores = self._scores(reading, mask)
            best = list(scores)[reading.pick(reading.logs.new_tensor(list(scores.values())), mask)]
            return [token for token in best if token != vocabulary.end], self._with(best)
        ways, allowed = self._ways(), self._values()
        heads = vocabulary.only([ids[0] for ids, _ in ways])
        token = reading.pick(reading.at(mask).masked_fill(~(allowed | heads), -torch.inf), mask)
        if heads[token]:
            form = replace(self, options=ways)._with((token,))
            return [token] * (token != vocabulary.end), form
        if self.node is not None and self.node.digits is not None:
            return [token], replace(self, left=self.left - 1, number=self.number + vocabulary.pieces[token])
        is_backslash = not self.is_escaped and token in vocabulary.backslashes
        chars = self.chars + (1 if self.is_escaped else int(vocabulary.lengths[token]))
        return [token], replace(self, left=self.left - 1, chars=chars, is_escaped=is_backslash)

    def _scores(self, reading: Reading, mask: int) -> dict[tuple[int, ...], float]:
        """The log-probability of what each option has at this mask and the following ones, as far as there are some."""
        scores: dict[tuple[int, ...], float] = {}
        open_: dict[tuple[int, ...], tuple[float, list[int]]] = {(): (0.0, list(range(len(self.options))))}
        for depth in range(len(reading.logs) - mask + 1):
            following: dict[tuple[int, ...], tuple[float, list[int]]] = {}
            for done, (score, members) in open_.items():
                tails: dict[int, list[int]] = {}
                for member in members:
                    ids = self.options[member][0]
                    if self.begun + depth < len(ids) and mask + depth < len(reading.logs):
                        tails.setdefault(ids[self.begun + depth], []).append(member)
                if not tails:
                    scores[done] = score
                    continue
                logs = reading.at(mask + depth)[list(tails)].log_softmax(-1).tolist()
                for (token, own), log in zip(tails.items(), logs, strict=True):
                    following[(*done, token)] = score + log, own
            open_ = following
        return scores

    def _with(self, tokens: Sequence[int]) -> Form:
        """After more tokens of the options."""
        form = self
        for token in tokens:
            options = tuple(each for each in form.options if each[0][form.begun] == token)
            left = form.left - (token != self.grammar.vocabulary.end)
            form = replace(form, options=options, begun=form.begun + 1, left=left)
            ended = next((branch for ids, branch in options if len(ids) == form.begun), None)
            if ended is not None:
                form = Form(self.grammar, ended.next(), left)
        return form
