"""A prediction of a text: where it is believed, and how far it was right.

What the model puts somewhere of its own accord, and what was predicted there, needs no confidence besides: an algorithm that
never changes a token sets it at once. So no token of the text is other than one the model preferred when it was set, and no
block takes more refinements than it could without; but with more tokens there, others may be preferred later than without a
prediction. To algorithms that correct tokens the prediction is what a block begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stepwell.samplers.unmask import Candidate, Canvas, Choice

LONGEST, SHORTEST = 8, 2  # tokens that tell where in the prediction a text is


@dataclass(frozen=True, slots=True)
class Prediction:
    """ids: the predicted tokens, and how many of them the text is behind; hints: what is predicted of the active block's places;
    accepted: positions that have what was predicted."""

    ids: tuple[int, ...]
    behind: int = 0
    hints: dict[int, int] = field(default_factory=dict)
    accepted: frozenset[int] = frozenset()

    def hinting(self, certain: Sequence[int], first: int, canvas: Canvas) -> Prediction:
        """With the hints for a block after the tokens of the text that are certain, from place `first` on."""
        behind = self._aligned(certain)
        at = len(certain) + behind
        expected = zip(range(first, canvas.own.stop), self.ids[at:] if at >= 0 else (), strict=False)
        return replace(self, behind=behind, hints={place: token for place, token in expected if token != canvas.mask})

    def _aligned(self, certain: Sequence[int]) -> int:
        """Where the text's last tokens are in the prediction, the nearest to where it was last; from there it goes on."""
        count, at = len(certain), len(certain) + self.behind
        if not count or not self.ids or (1 <= at <= len(self.ids) and self.ids[at - 1] == certain[-1]):
            return self.behind
        for size in range(min(LONGEST, count), SHORTEST - 1, -1):
            tail = tuple(certain[-size:])
            ends = [end for end in range(size, len(self.ids) + 1) if self.ids[end - size : end] == tail]
            if ends:
                return min(ends, key=lambda end: abs(end - at)) - count
        return self.behind

    def agreed(self, canvas: Canvas, choice: Choice, candidates: Sequence[Candidate]) -> Choice:
        """A choice, and with it all candidates that were predicted."""
        agreed = {c.place: c.token for c in candidates if self.hints.get(c.place) == c.token}
        own = enumerate(choice.tokens)
        tokens = tuple(agreed.get(place, token) if token == canvas.mask else token for place, token in own)
        return replace(choice, tokens=tokens, is_done=choice.is_done or not replace(canvas, tokens=tokens).masked)

    def proposed(self, canvas: Canvas) -> Canvas:
        """The canvas of a block with what is predicted in place of its masks."""
        own = enumerate(canvas.tokens)
        return replace(canvas, tokens=tuple(self.hints.get(p, t) if p in canvas.own and t == canvas.mask else t for p, t in own))

    def counted(self, tokens: Sequence[int], base: int) -> Prediction:
        """After places of the block, which is at position `base`, were set for good."""
        right = {base + place for place, token in self.hints.items() if tokens[place] == token}
        return replace(self, accepted=self.accepted | right)
