"""What requests give for their text, in tokens: the prompt, what follows the text, and the grammar that holds it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from stepwell.errors import InvalidRequest
from stepwell.samplers.calls import calls_of
from stepwell.samplers.schema import shape_of
from stepwell.stages.base import Item, Stage
from stepwell.stages.form import Grammar, Vocabulary
from stepwell.stages.tokens import Codec
from stepwell.types import Request

MEMO = 4096  # prompts whose ids are remembered between intake and their first step


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids of a prompt, the most tokens its text may have, and what else may be given: the ids of what follows it, those it
    is expected to have, what it must be like."""

    ids: tuple[int, ...]
    limit: int
    suffix: tuple[int, ...] = ()
    predicted: tuple[int, ...] = ()
    grammar: Grammar | None = None


class Prompts:
    """What requests give: made at intake, and kept for their first step. size: tokens of a block."""

    def __init__(self, codec: Codec, size: int, device: str = "cpu"):
        self.codec, self.size, self.device = codec, size, device
        self._memo: OrderedDict[str, tuple[Request, Prompt]] = OrderedDict()

    def of(self, request: Request) -> Prompt:
        """Raises InvalidRequest if there is more than fits."""
        if request.id not in self._memo or self._memo[request.id][0] != request:
            self._memo[request.id] = request, self._made(request)
            if len(self._memo) > MEMO:
                self._memo.popitem(last=False)
        return self._memo[request.id][1]

    def _made(self, request: Request) -> Prompt:
        text = request.text
        assert text is not None
        ids = tuple(self.codec.prompt(request))
        limit = self.codec.limit(request, len(ids))
        grammar = None
        if text.is_held:
            shape, what = calls_of(text.tools, text.must_call, text.most_calls), "call of these tools"
            if text.schema is not None:
                shape, what = shape_of(text.schema), "text of this schema"
            grammar = Grammar(shape, self.vocabulary)
            least = grammar.need(grammar.root)
            if least > limit:
                raise InvalidRequest(f"max_tokens = {limit}: the shortest {what} may take {least}", param="max_tokens")
        suffix = self.codec.encode(text.suffix) if text.suffix else ()
        if suffix:
            limit = self._gap(text.max_tokens, limit, len(ids), len(suffix))
        return Prompt(ids, limit, suffix, self.codec.encode(text.prediction or ""), grammar)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Read when the first schema asks for it: it takes a second or so for a hundred thousand tokens."""
        return Vocabulary(self.codec, self.device)

    def _gap(self, asked: int | None, limit: int, before: int, after: int) -> int:
        """Tokens between a prompt and its suffix. A block sees nothing of later ones, so both are in the block that the prompt
        ends in. Raises InvalidRequest if they are too long for it."""
        room = self.size - before % self.size
        most = min(limit, room - after)
        if (most < 1 and asked != 0) or (asked is not None and asked > most):
            raise InvalidRequest(
                f"suffix: its {after} tokens and a gap of {1 if asked is None else asked} must fit into the {room} tokens that "
                f"the prompt's {before} leave of a block of {self.size}"
                + (f"; max_tokens = {most} would do" if most > 0 else ""),
                param="suffix",
            )
        return most if asked is None else asked


class EncodePrompt(Stage):
    """Puts a prompt's ids where the blocks are filled from."""

    name = "encode_text"

    def __init__(self, prompts: Prompts):
        self.prompts = prompts

    def tokens(self, request: Request) -> int:
        return max(1, len(self.prompts.of(request).ids))

    def run(self, items: Sequence[Item]) -> list[bool]:
        for state, _ in items:
            state.prompt = self.prompts.of(state.request)
        return [True] * len(items)
