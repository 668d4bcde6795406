"""Paired timing: candidates take turns in one process on one thread, and process CPU time is compared.

Another process on the machine then costs all candidates alike, and nothing is compared across runs. Figures are the
least CPU time of each candidate; ratios are to the first one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Least and median CPU milliseconds of a candidate, and how many times faster than the first it is."""

    name: str
    least_ms: float
    median_ms: float
    speedup: float


def compare(candidates: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> list[Timing]:
    """Time candidates in turn, forwards and backwards."""
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        names = list(candidates) if number % 2 == 0 else list(reversed(candidates))
        for name in names:
            began = time.process_time()
            candidates[name]()
            taken[name].append((time.process_time() - began) * 1e3)
    first = min(next(iter(taken.values())))
    return [Timing(name, min(ms), sorted(ms)[len(ms) // 2], first / min(ms)) for name, ms in taken.items()]
