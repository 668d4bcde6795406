"""How a block of text is unmasked: from the candidates of one forward to the block's next tokens. Pure, and without torch.

An algorithm is a dataclass of its parameters. It says which places it needs logits of, may adjust these, and chooses among
the candidates. `edits` tells whether it may change a token it has set, so that nothing of a block is certain before its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from stepwell.errors import InvalidRequest
from stepwell.types import DiffusionParams

if TYPE_CHECKING:
    from torch import Tensor

MOST = 10_000  # of any step count
DEFAULT_ALGORITHM = "LowConfidence"


@dataclass(frozen=True, slots=True)
class Canvas:
    """A block being filled. The first `fixed` tokens are given, and those from `end` on, None for none; `step` counts the
    refinements it has had; `memory` is what the algorithm's last call handed on."""

    tokens: tuple[int, ...]
    mask: int
    fixed: int = 0
    step: int = 0
    memory: Any = None
    end: int | None = None

    @property
    def own(self) -> range:
        """The places that are not given."""
        return range(self.fixed, len(self.tokens) if self.end is None else self.end)

    @property
    def masked(self) -> list[int]:
        """What is to be filled; a mask that was given stays one."""
        return [place for place in self.own if self.tokens[place] == self.mask]

    def edits(self, tokens: Sequence[int]) -> int:
        """How many of its tokens, masks aside, are others in `tokens`."""
        return sum(old not in (new, self.mask) for old, new in zip(self.tokens, tokens, strict=True))


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may come to a place, and its probability without temperature."""

    place: int
    token: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The block's next tokens, whether it is finished, and what the algorithm wants to know the next time."""

    tokens: tuple[int, ...]
    is_done: bool
    memory: Any = None


class Algorithm(Protocol):
    edits: ClassVar[bool]

    def most_steps(self, size: int) -> int:
        """Refinements that a block of `size` tokens takes at most."""
        ...

    def places(self, canvas: Canvas) -> list[int]:
        """Where it needs logits."""
        ...

    def adjust(self, canvas: Canvas, places: Sequence[int], logits: Tensor) -> tuple[Tensor, Any]:
        """What candidates and confidences come from, and the memory for `choose`. logits: (places, vocabulary)"""
        ...

    def choose(self, canvas: Canvas, candidates: Sequence[Candidate]) -> Choice:
        """The candidates are of `places`, in order; the canvas has the memory of `adjust`."""
        ...


# ------------------------------------------------------------------------------------------------------------ algorithms
class _Absorbing:
    """What algorithms that never change a token have in common: each refinement sets one at least."""

    edits: ClassVar[bool] = False
    max_steps: int | None

    def most_steps(self, size: int) -> int:
        return size if self.max_steps is None else min(size, self.max_steps)

    def places(self, canvas: Canvas) -> list[int]:
        return canvas.masked

    def adjust(self, canvas: Canvas, places: Sequence[int], logits: Tensor) -> tuple[Tensor, Any]:
        return logits, canvas.memory

    def _set(self, canvas: Canvas, candidates: Sequence[Candidate], certain: Sequence[Candidate]) -> Choice:
        """All that are certain, or else the likeliest; at the last step all there are."""
        if canvas.step + 1 >= self.most_steps(len(canvas.tokens)):
            certain = candidates
        elif not certain and candidates:
            certain = [max(candidates, key=lambda c: c.confidence)]
        return Choice(_with(canvas.tokens, certain), len(certain) == len(candidates), canvas.memory)


@dataclass(frozen=True, slots=True)
class LowConfidence(_Absorbing):
    """Set every token the model is sure of, and the likeliest one if there is none (LLaDA2.0 §5; SGLang's LowConfidence)."""

    threshold: float = 0.95
    max_steps: int | None = None

    def choose(self, canvas: Canvas, candidates: Sequence[Candidate]) -> Choice:
        return self._set(canvas, candidates, [c for c in candidates if c.confidence > self.threshold])


@dataclass(frozen=True, slots=True)
class Hierarchy(_Absorbing):
    """The same, and the likeliest token of every run of masks if it passes a lower threshold: far from each other they can't
    contradict each other much (dInfer's hierarchical decoding)."""

    threshold: float = 0.95
    low_threshold: float = 0.4
    max_steps: int | None = None

    def choose(self, canvas: Canvas, candidates: Sequence[Candidate]) -> Choice:
        certain = [c for c in candidates if c.confidence > self.threshold]
        run: list[Candidate] = []
        for candidate in (*candidates, None):
            if run and (candidate is None or candidate.place != run[-1].place + 1):
                best = max(run, key=lambda c: c.confidence)
                if self.low_threshold < best.confidence <= self.threshold:
                    certain.append(best)
                run = []
            if candidate is not None:
                run.append(candidate)
        return self._set(canvas, candidates, certain)


@dataclass(frozen=True, slots=True)
class Credit(_Absorbing):
    """A token that was the likeliest of its place before gets credit, which fades: a steady second guess is set earlier
    (dInfer's credit decoding: logits + weight · log(1 + credit), where credit = decay · credit + p^0.2 of the likeliest)."""

    threshold: float = 0.95
    credit_decay: float = 0.8
    credit_weight: float = 0.7
    max_steps: int | None = None

    def adjust(self, canvas: Canvas, places: Sequence[int], logits: Tensor) -> tuple[Tensor, Any]:
        best = logits.softmax(-1).max(-1)
        masked = set(canvas.masked)
        credits = {key: credit * self.credit_decay for key, credit in (canvas.memory or {}).items() if key[0] in masked}
        for place, token, probability in zip(places, best.indices.tolist(), best.values.tolist(), strict=True):
            credits[place, token] = credits.get((place, token), 0.0) + probability**0.2
        row = {place: index for index, place in enumerate(places)}
        keys = list(credits)
        at = logits.new_tensor([[row[place] for place, _ in keys], [token for _, token in keys]]).long()
        bonus = self.credit_weight * logits.new_tensor([credits[key] for key in keys]).log1p()
        return logits.index_put((at[0], at[1]), bonus, accumulate=True), credits

    def choose(self, canvas: Canvas, candidates: Sequence[Candidate]) -> Choice:
        return self._set(canvas, candidates, [c for c in candidates if c.confidence > self.threshold])


@dataclass(frozen=True, slots=True)
class JointThreshold:
    """Set masks and correct set tokens in one pass, until nothing changes or the budget of corrections after the last mask is
    spent (LLaDA2.1 §3; SGLang's JointThreshold). Its weights must have been trained to correct: LLaDA2.0's were not.
    `penalty_lambda` is taken off the logit of a place's left neighbour's token."""

    edits: ClassVar[bool] = True
    threshold: float = 0.5
    edit_threshold: float = 0.0
    max_post_edit_steps: int = 16
    penalty_lambda: float = 0.0
    max_steps: int | None = None

    def most_steps(self, size: int) -> int:
        steps = size + self.max_post_edit_steps + 1
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def places(self, canvas: Canvas) -> list[int]:
        return list(canvas.own)

    def adjust(self, canvas: Canvas, places: Sequence[int], logits: Tensor) -> tuple[Tensor, Any]:
        rows = [row for row, place in enumerate(places) if place > 0]
        if not self.penalty_lambda or not rows:
            return logits, canvas.memory
        at = logits.new_tensor([rows, [canvas.tokens[places[row] - 1] for row in rows]]).long()
        return logits.index_put((at[0], at[1]), logits.new_tensor(-self.penalty_lambda), accumulate=True), canvas.memory

    def choose(self, canvas: Canvas, candidates: Sequence[Candidate]) -> Choice:
        masked = [c for c in candidates if canvas.tokens[c.place] == canvas.mask]
        corrections_left = self.max_post_edit_steps if canvas.memory is None else canvas.memory
        if not masked:
            if corrections_left == 0:
                return Choice(canvas.tokens, True)
            corrections_left -= 1
        edited = [
            c for c in candidates
            if canvas.tokens[c.place] not in (canvas.mask, c.token) and c.confidence > self.edit_threshold
        ]  # fmt: skip
        if canvas.step + 1 >= self.most_steps(len(canvas.tokens)):
            return Choice(_with(canvas.tokens, masked), True)
        certain = [c for c in masked if c.confidence > self.threshold]
        if masked and not certain:
            certain = [max(masked, key=lambda c: c.confidence)]
        if not certain and not edited:
            return Choice(canvas.tokens, True)
        return Choice(_with(canvas.tokens, (*certain, *edited)), False, corrections_left)


def _with(tokens: tuple[int, ...], candidates: Sequence[Candidate]) -> tuple[int, ...]:
    changed = {c.place: c.token for c in candidates}
    return tuple(changed.get(place, token) for place, token in enumerate(tokens))


def uniform(seed: int, position: int, step: int) -> float:
    """A number in [0, 1) that belongs to this place of this text at this refinement, whoever else is computed beside it."""
    digest = blake2b(b"%d %d %d" % (seed, position, step), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


# ------------------------------------------------------------------------------------------------------------ by name
ALGORITHMS: Mapping[str, type[Any]] = {
    "LowConfidence": LowConfidence,
    "JointThreshold": JointThreshold,
    "Credit": Credit,
    "Hierarchy": Hierarchy,
}


def algorithm_of(params: DiffusionParams, where: str = "diffusion") -> Algorithm:
    """The algorithm asked for. Raises InvalidRequest, naming the parameter."""
    name = params.algorithm or DEFAULT_ALGORITHM
    if name not in ALGORITHMS:
        raise InvalidRequest(f"{where}.algorithm = {name!r}: must be one of {', '.join(ALGORITHMS)}", param=f"{where}.algorithm")
    kind = ALGORITHMS[name]
    known = [field.name for field in fields(kind)]
    given: dict[str, Any] = {}
    for field in fields(params):
        value = getattr(params, field.name)
        if field.name == "algorithm" or value is None:
            continue
        if field.name not in known:
            raise InvalidRequest(
                f"{where}.{field.name} does not apply to {name}, which has {', '.join(known)}", param=f"{where}.{field.name}"
            )
        _check(f"{where}.{field.name}", field.name, value)
        given[field.name] = value
    made: Algorithm = kind(**given)
    return made


def _check(label: str, name: str, value: object) -> None:
    least = 1 if name == "max_steps" else 0
    most = 1.0 if name.endswith("threshold") or name == "credit_decay" else 1000.0
    if name.endswith("_steps"):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise InvalidRequest(f"{label} = {value!r}: must be an integer between {least} and {MOST}", param=label)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InvalidRequest(f"{label} = {value!r}: must be a number between 0 and {most:g}", param=label)


def params_of(given: Mapping[str, Any], where: str = "diffusion") -> DiffusionParams:
    """Parameters from a mapping. Raises InvalidRequest for a name that no algorithm has."""
    known = [field.name for field in fields(DiffusionParams)]
    for name in given:
        if name not in known:
            raise InvalidRequest(f"{where}.{name}: unknown; there are {', '.join(known)}", param=f"{where}.{name}")
    return DiffusionParams(**given)


def merged(asked: DiffusionParams, defaults: DiffusionParams) -> DiffusionParams:
    """A request's parameters over the server's, which are of the server's own algorithm only."""
    if asked.algorithm not in (None, defaults.algorithm or DEFAULT_ALGORITHM):
        return asked
    given = {field.name: getattr(asked, field.name) for field in fields(asked)}
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})
