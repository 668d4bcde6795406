"""What the step cache remembers of one lane, and how it decides about the next step.

Reference: DBCache and TaylorSeer of cache-dit (`CachedContextManager.can_cache`, `TaylorSeerState`), whose decisions and values
these are; first-block cache of ParaAttention and diffusers; TeaCache (F. Liu et al. 2024, "Timestep Embedding Tells").
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import torch
from torch import Tensor

from stepwell.cache.masks import step_mask
from stepwell.cache.params import UNBOUNDED
from stepwell.ops.blocks import Rows
from stepwell.types import CacheParams, CacheReport

logger = logging.getLogger(__name__)
FIRST_DERIVATIVE = 3  # cache-dit takes derivatives from the fourth step on: the first steps change too much


class Verdict(Enum):
    """What is known of a step before anything is measured."""

    COMPUTE = auto()
    CACHE = auto()
    MEASURE = auto()  # it depends on how far the signal has moved


@dataclass(frozen=True, slots=True)
class Taylor:
    """Values and finite differences of some tensors as of the last computed step (J. Liu et al. 2025, "TaylorSeer", eq. 5)."""

    step: int
    ladders: tuple[tuple[Tensor, ...], ...]  # per tensor: value, first difference, …

    @classmethod
    def after(cls, last: Taylor | None, values: Rows, step: int, order: int) -> Taylor:
        ladders = []
        for place, value in enumerate(values):
            ladder = [value]
            before = () if last is None or step < FIRST_DERIVATIVE else last.ladders[place]
            for previous in before[:order]:
                assert last is not None
                ladder.append((ladder[-1] - previous) / (step - last.step))
            ladders.append(tuple(ladder))
        return cls(step, tuple(ladders))

    def at(self, step: int) -> Rows:
        """The values extrapolated to a later step: Σ Δⁱ kⁱ / i!"""
        elapsed = step - self.step
        return tuple(_series(ladder, elapsed) for ladder in self.ladders)


def _series(ladder: tuple[Tensor, ...], elapsed: int) -> Tensor:
    total = ladder[0]
    for i, difference in enumerate(ladder[1:], start=1):
        total = total + difference * (elapsed**i / math.factorial(i))
    return total


@dataclass(frozen=True, slots=True)
class Known:
    """Everything that is remembered after a step; never changed, only replaced."""

    signal: Tensor | None = None  # what decisions compare with
    signal_size: Tensor | None = None  # its mean magnitude
    skipped: Taylor | None = None  # what the blocks between the first and the last ones add
    run: int = 0  # cached steps in a row
    moved: float = 0.0  # teacache: since the last computed step
    computed: tuple[bool, ...] = ()
    residuals: tuple[float | None, ...] = ()
    blocks_run: int = 0


@dataclass(slots=True)
class CacheMemory:
    """One lane's step cache. `begin` a step, ask for a `verdict`, `decide`, and `note` what was done.

    A step that is begun again, because a call failed and is repeated, starts from what was known before it.
    """

    params: CacheParams
    steps: int
    mask: tuple[bool, ...] | None = None
    coefficients: tuple[float, ...] = ()
    step: int = -1
    known: Known = field(default_factory=Known)
    _before: Known = field(default_factory=Known)

    @classmethod
    def of(cls, params: CacheParams, steps: int, coefficients: tuple[float, ...]) -> CacheMemory | None:
        """None where the request has no cache."""
        if params.method == "none":
            return None
        return cls(params, steps, step_mask(params, steps), coefficients)

    @property
    def is_teacache(self) -> bool:
        return self.params.method == "teacache"

    def bounds(self, blocks: int) -> tuple[int, int]:
        """Blocks from the first number up to the second may be skipped."""
        assert self.params.fn is not None and self.params.bn is not None
        return self.params.fn, blocks - self.params.bn

    def begin(self, step: int) -> None:
        if step == self.step:
            self.known = self._before
        self._before, self.step = self.known, step

    def verdict(self) -> Verdict:
        """The rules that need no look at the signal, in cache-dit's order."""
        params, known = self.params, self.known
        assert params.warmup is not None and params.mc is not None and params.rdt is not None
        warmup = params.warmup
        if self.mask is not None:
            warmup = min(warmup, next((place for place, computes in enumerate(self.mask) if not computes), self.steps))
        if params.rdt <= 0 or self.step < warmup or known.skipped is None or (self.is_teacache and self.step == self.steps - 1):
            return Verdict.COMPUTE
        if self.mask is not None:
            if self.mask[self.step]:
                return Verdict.COMPUTE
            if params.scm_policy == "static":
                return Verdict.CACHE
        if params.mc != UNBOUNDED and known.run >= params.mc:
            return Verdict.COMPUTE
        return Verdict.MEASURE

    def change(self, signal: Tensor) -> Tensor:
        """mean |signal − last| and mean |last|, (2,) on the device; a distance is their ratio"""
        known = self.known
        assert known.signal is not None and known.signal_size is not None
        return torch.stack(((known.signal - signal).abs().mean(dtype=torch.float32), known.signal_size))

    def decide(self, distance: float) -> bool:
        """Whether the step is cached, by how far its signal is from the one remembered."""
        assert self.params.rdt is not None
        if not self.is_teacache:
            told = any(change is not None and math.isnan(change) for change in self.known.residuals)
            if math.isnan(distance) and self.known.signal_size == 0 and not told:
                logger.warning(
                    "step cache: the first %d of the blocks add nothing, which tells no steps apart; raise fn", self.params.fn
                )
            return self.params.rdt >= 1 or distance < self.params.rdt
        self.known = replace(self.known, moved=self.known.moved + abs(_polynomial(self.coefficients, distance)))
        return self.known.moved < self.params.rdt

    def estimate(self) -> Rows:
        """What the skipped blocks would have added."""
        assert self.known.skipped is not None
        return self.known.skipped.at(self.step)

    def note_computed(self, signal: Tensor, added: Rows, distance: float | None, blocks_run: int) -> None:
        """Remember a step that ran in full; `added` is what the blocks that may be skipped did to each tensor."""
        order = self.params.ts_order if self.params.taylorseer else 0
        assert order is not None
        self.known = replace(
            self._noted(distance, blocks_run, is_computed=True),
            signal=signal,
            signal_size=signal.abs().mean(dtype=torch.float32),
            skipped=Taylor.after(self.known.skipped, added, self.step, order),
            run=0,
            moved=0.0,
        )

    def note_cached(self, signal: Tensor, distance: float | None, blocks_run: int) -> None:
        """Remember a step some blocks of which were skipped."""
        self.known = replace(self._noted(distance, blocks_run, is_computed=False), run=self.known.run + 1)
        if self.is_teacache:  # it measures from step to step, others from the last computed one
            self.known = replace(self.known, signal=signal, signal_size=signal.abs().mean(dtype=torch.float32))

    def _noted(self, distance: float | None, blocks_run: int, *, is_computed: bool) -> Known:
        return replace(
            self.known,
            computed=(*self.known.computed, is_computed),
            residuals=(*self.known.residuals, distance),
            blocks_run=self.known.blocks_run + blocks_run,
        )


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    """Highest power first."""
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


Note = tuple[int, tuple[bool, ...], tuple[float | None, ...]]  # of one lane: blocks run, and of each step `Known`'s two


def note(memory: CacheMemory) -> Note:
    """What a report needs of one guidance branch."""
    return memory.known.blocks_run, memory.known.computed, memory.known.residuals


def report(branches: Sequence[Note], blocks: int) -> CacheReport:
    """What was done for one output, from its guidance branches."""
    possible = sum(len(computed) for _, computed, _ in branches) * blocks
    ratio = sum(blocks_run for blocks_run, _, _ in branches) / possible if possible else 1.0
    return CacheReport(ratio, *branches[0][1:])


def joined(first: CacheReport | None, second: CacheReport | None) -> CacheReport | None:
    """One report of two stretches of steps, one after the other, of as many blocks each; None where there was no cache."""
    if first is None or second is None:
        return second if first is None else first
    counts = len(first.computed_steps), len(second.computed_steps)
    ratio = (first.computed_ratio * counts[0] + second.computed_ratio * counts[1]) / max(1, sum(counts))
    return CacheReport(ratio, first.computed_steps + second.computed_steps, first.residuals + second.residuals)
