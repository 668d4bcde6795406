"""Sliding tile attention (Zhang et al. 2025) in plain PyTorch: exact, on any device, grid and window.

The queries of a tile attend to the tiles of a window around it and to the prefix (text); the prefix attends to all. Queries
that share a window are one dense call, so nothing is masked. Each sequence is computed by itself: its bits do not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.backends.tiles import Grid, Tiles, by_sequence, clipped
from stepwell.ops.packing import Lane, Segments

TILE: Grid = (6, 8, 8)
WindowsOf = Callable[[int, int], tuple[Grid, ...]]  # (step, of steps) -> the window of each head, in tiles
Plan = list[tuple[Tensor, Tensor]]  # rows of queries, rows of the keys they see


class Planner:
    """Which rows see which, remembered for the last layouts; shared by all layers of a model."""

    def __init__(self, tile: Grid = TILE):
        self.tile = tile
        self.plan = lru_cache(maxsize=256)(self._plan)

    def _plan(self, prefix: int, grid: Grid, window: Grid, device: torch.device) -> Plan:
        text = torch.arange(prefix)
        found = Tiles.of(grid, clipped(self.tile, grid)).windows(window)
        rows = [(queries + prefix, torch.cat((text, keys + prefix))) for queries, keys in found]
        return [(queries.to(device), keys.to(device)) for queries, keys in rows]


class SlidingTile:
    """The kernel of one layer."""

    def __init__(self, windows: WindowsOf, planner: Planner):
        self.windows, self.planner = windows, planner

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        return by_sequence(self._sequence, q, k, v, segments)

    def _sequence(self, lane: Lane, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (heads, length, head_dim)
        heads_of: dict[Grid, list[int]] = {}
        for head, window in enumerate(self.windows(lane.step, lane.steps)):
            heads_of.setdefault(window, []).append(head)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if lane.prefix:
            out[:, : lane.prefix] = F.scaled_dot_product_attention(q[None, :, : lane.prefix], k[None], v[None])[0]
        for window, heads in heads_of.items():
            qs, ks, vs = (q, k, v) if len(heads) == len(q) else (q[heads], k[heads], v[heads])
            where = torch.tensor(heads, device=q.device)[:, None]
            for queries, keys in self.planner.plan(lane.prefix, lane.grid, window, q.device):
                attended = F.scaled_dot_product_attention(qs[None, :, queries], ks[None, :, keys], vs[None, :, keys])
                out[where, queries] = attended[0]
        return out.transpose(0, 1).flatten(1)
