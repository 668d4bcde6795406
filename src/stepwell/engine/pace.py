"""How fast steps go: what the next one should take, what the queue will take, and when one is overdue."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from stepwell.engine.api import Kind, Tally

MEMORY = 64  # steps of each kind whose pace is remembered
FADE = 0.98  # weight of the past, per step, in the overall rate
SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
TOKENS = (64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)


class Pace:
    """Written by the loop's thread; the rest may be read from any."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds: dict[Kind, Tally] = {}
        self.step_tokens: dict[Kind, Tally] = {}
        self._s_per_token: dict[Kind, deque[float]] = {}
        self._recent = (0.0, 0.0)  # cost, seconds; both fading
        self._under_way: tuple[Kind, int, float] | None = None

    @contextmanager
    def step(self, kind: Kind, tokens: int, cost: int) -> Iterator[None]:
        """Around the execution of a step of so many tokens; `cost` is comparable across models."""
        began = time.monotonic()
        self._under_way = kind, tokens, began
        try:
            yield
        finally:
            self._under_way = None
        took_s = max(time.monotonic() - began, 1e-6)
        self.tokens += tokens
        self.seconds.setdefault(kind, Tally(SECONDS)).add(took_s)
        self.step_tokens.setdefault(kind, Tally(TOKENS)).add(tokens)
        self._s_per_token.setdefault(kind, deque(maxlen=MEMORY)).append(took_s / max(tokens, 1))
        self._recent = FADE * self._recent[0] + cost, FADE * self._recent[1] + took_s

    @property
    def tokens_per_s(self) -> float:
        """Work of all stages per second lately, in tokens of the largest model; 0 before the first step."""
        cost, seconds = self._recent
        return cost / seconds if seconds else 0.0

    def overdue(self) -> tuple[float, float | None]:
        """Seconds the step under way has taken (0 if there is none), and what such a step should take, if that is known."""
        under_way = self._under_way
        if under_way is None:
            return 0.0, None
        kind, tokens, began = under_way
        seen = list(self._s_per_token.get(kind, ()))
        return time.monotonic() - began, statistics.median(seen) * tokens if seen else None
