"""The step cache as a runner of blocks: in a packed batch, sequences that must compute do so together, others pass by.

Every sequence has a stretch of blocks it may skip (`CacheMemory.bounds`). Where the stretch begins it is decided; whoever
skips waits at its end, where what the stretch added in earlier steps is added again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.cache.memory import CacheMemory, Verdict
from stepwell.ops.blocks import BlockCall, BlockRunner, Blocks, Rows, run_all
from stepwell.ops.packing import Lane

Mean = Callable[[Tensor, Sequence[Lane]], Tensor]


def here(values: Tensor, lanes: Sequence[Lane]) -> Tensor:
    """The mean over what is in this process."""
    return values


class StepCache:
    """A BlockRunner; `inner` runs the blocks that are computed. `mean`: from means over the tokens of lanes, (lanes, 2), to
    those over all of their tokens, where they are cut."""

    def __init__(self, inner: BlockRunner = run_all, mean: Mean = here):
        self.inner, self.mean = inner, mean

    def __call__(self, blocks: Sequence[nn.Module], x: Any, call: Any) -> Any:
        if all(lane.cache is None for lane in call.lanes):
            return self.inner(blocks, x, call)
        return _Forward(blocks, x, call, self).run()


def attach(model: nn.Module, mean: Mean = here) -> None:
    """Block seam: let lanes that have a cache use it. Others notice nothing."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.runner = StepCache(module.runner, mean)


class _Forward:
    """One forward over a packed batch."""

    def __init__(self, blocks: Sequence[nn.Module], x: Any, call: BlockCall, cache: StepCache):
        self.blocks, self.call, self.inner, self.mean = blocks, call, cache.inner, cache.mean
        self.memories: dict[int, CacheMemory] = {}
        for place, lane in enumerate(call.lanes):
            if lane.cache is not None:
                lane.cache.begin(lane.step)
                self.memories[place] = lane.cache
        self.bounds = {place: memory.bounds(len(blocks)) for place, memory in self.memories.items()}
        self.rows: list[Rows] = call.split(x)
        self.at_start = [rows[0] for rows in self.rows]
        self.modulated: Sequence[Tensor] = ()
        if any(memory.is_teacache for memory in self.memories.values()):
            first: Any = blocks[0]
            self.modulated = first.modulated(x, call)
        self.skipping: set[int] = set()
        self.before: dict[int, Rows] = {}  # rows where the stretch begins, of those who compute it
        self.signals: dict[int, Tensor] = {}
        self.distances: dict[int, float] = {}

    def run(self) -> Any:
        cuts = sorted({0, len(self.blocks), *(bound for bounds in self.bounds.values() for bound in bounds)})
        for begin, end in pairwise(cuts):
            self._end_stretches(begin)
            self._begin_stretches(begin)
            self._advance(begin, end)
        self._end_stretches(len(self.blocks))
        return self.call.join(self.rows)

    def _advance(self, begin: int, end: int) -> None:
        """Run some blocks for everybody who is not skipping."""
        active = [place for place in range(len(self.rows)) if place not in self.skipping]
        if not active:
            return
        part = self.call.only(active)
        after = self.inner(self.blocks[begin:end], part.join([self.rows[place] for place in active]), part)
        for place, rows in zip(active, part.split(after), strict=True):
            self.rows[place] = rows

    def _begin_stretches(self, cut: int) -> None:
        places = [place for place, (begin, _) in self.bounds.items() if begin == cut]
        verdicts = {place: self.memories[place].verdict() for place in places}
        for place in places:
            memory = self.memories[place]
            self.signals[place] = self.modulated[place] if memory.is_teacache else self.rows[place][0] - self.at_start[place]
        measured = [place for place, verdict in verdicts.items() if verdict is Verdict.MEASURE]
        if measured:  # one transfer from the device for all
            changes = torch.stack([self.memories[place].change(self.signals[place]) for place in measured])
            moved, size = self.mean(changes, [self.call.lanes[place] for place in measured]).unbind(1)
            self.distances.update(zip(measured, (moved / size).tolist(), strict=True))
        for place, verdict in verdicts.items():
            skips = verdict is Verdict.CACHE or (
                verdict is Verdict.MEASURE and self.memories[place].decide(self.distances[place])
            )
            if skips:
                self.skipping.add(place)
            else:
                self.before[place] = self.rows[place]

    def _end_stretches(self, cut: int) -> None:
        for place, (begin, end) in self.bounds.items():
            if end != cut:
                continue
            memory, distance = self.memories[place], self.distances.get(place)
            if place in self.skipping:
                self.skipping.remove(place)
                self.rows[place] = tuple(rows + added for rows, added in zip(self.rows[place], memory.estimate(), strict=True))
                memory.note_cached(self.signals[place], distance, len(self.blocks) - (end - begin))
            else:
                added = tuple(now - before for now, before in zip(self.rows[place], self.before[place], strict=True))
                memory.note_computed(self.signals[place], added, distance, len(self.blocks))
