"""Attention to the most promising tiles only, in plain PyTorch: the fine stage of video sparse attention (Zhang et al. 2025,
"VSA: Faster Video Diffusion with Trainable Sparse Attention"), without its trained gates.

A tile of queries attends to the tiles whose mean key has the largest product with its mean query, each head for itself, and
to the prefix (text); the prefix attends to all. Each sequence is computed by itself: its bits do not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.backends.tiles import Grid, Tiles, by_sequence, clipped
from stepwell.ops.packing import Lane, Segments

VIDEO_TILE: Grid = (4, 4, 4)  # 64 tokens, the authors' tile
PICTURE_TILE: Grid = (1, 8, 8)  # as many, where there is one frame
GATHERED = {"cpu": 2**21, "cuda": 2**27}  # elements of gathered keys at a time: on a CPU, what stays in cache


def tile_for(grid: Grid) -> Grid:
    """The tile a grid is cut into, always 64 tokens where the grid has them."""
    return VIDEO_TILE if grid[0] > 1 else PICTURE_TILE


def kept_tiles(tiles: int, sparsity: float) -> int:
    """How many of `tiles` are attended to, at least one (FastVideo's rounding)."""
    return max(1, min(tiles, math.ceil((1 - sparsity) * tiles)))


class BlockSparse:
    """One kernel for all layers; `sparsity` is the share of tiles skipped, in [0, 1)."""

    def __init__(self, sparsity: float, tile_of: Callable[[Grid], Grid] = tile_for):
        self.sparsity, self.tile_of = sparsity, tile_of
        self._tables = lru_cache(maxsize=64)(self._table)

    def _table(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        table, real = Tiles.of(grid, clipped(self.tile_of(grid), grid)).padded()
        return table.to(device), real.to(device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        return by_sequence(self._sequence, q, k, v, segments)

    def _sequence(self, lane: Lane, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (heads, length, head_dim)
        table, real = self._tables(lane.grid, q.device)
        keep = kept_tiles(len(table), self.sparsity)
        if keep == len(table):
            return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        prefix = lane.prefix
        if prefix:
            out[:, :prefix] = F.scaled_dot_product_attention(q[None, :, :prefix], k[None], v[None])[0]
        queries, keys, values = (t[:, table + prefix] for t in (q, k, v))  # (heads, tiles, tile, head_dim)
        chosen = best_tiles(queries, keys, real, keep)
        chunk = max(1, GATHERED[q.device.type] // (keys[:, :1].numel() * keep))
        for start in range(0, len(table), chunk):
            part = slice(start, start + chunk)
            seen = [_with_prefix(t[:, :prefix], _gathered(tiles, chosen[:, part])) for t, tiles in ((k, keys), (v, values))]
            mask = None if bool(real.all()) else _mask(real[chosen[:, part]], prefix)
            attended = F.scaled_dot_product_attention(queries[:, part], seen[0], seen[1], attn_mask=mask)
            out[:, table[part][real[part]] + prefix] = attended[:, real[part]]
        return out.transpose(0, 1).flatten(1)


def best_tiles(queries: Tensor, keys: Tensor, real: Tensor, keep: int) -> Tensor:
    """For each head and tile of queries the `keep` best tiles of keys, ascending: (heads, tiles, keep).

    queries, keys: (heads, tiles, tile, head_dim), of which `real` (tiles, tile) are no filling.
    """
    sizes = real.sum(1)[:, None]
    pooled = [(tiles.float() * real[:, :, None]).sum(2) / sizes for tiles in (queries, keys)]
    scores = pooled[0] @ pooled[1].transpose(1, 2)
    return scores.topk(keep, dim=-1).indices.sort(dim=-1).values


def _gathered(tiles: Tensor, chosen: Tensor) -> Tensor:
    """(heads, tiles, tile, head_dim), (heads, n, keep) -> (heads, n, keep · tile, head_dim)"""
    head = torch.arange(len(tiles), device=tiles.device)[:, None, None]
    return tiles[head, chosen].flatten(2, 3)


def _with_prefix(text: Tensor, seen: Tensor) -> Tensor:
    """(heads, prefix, head_dim), (heads, n, keys, head_dim) -> (heads, n, prefix + keys, head_dim)"""
    return torch.cat((text[:, None].expand(-1, seen.shape[1], -1, -1), seen), dim=2) if text.shape[1] else seen


def _mask(real: Tensor, prefix: int) -> Tensor:
    """(heads, n, keep, tile) -> which keys count, (heads, n, 1, prefix + keep · tile)"""
    return F.pad(real.flatten(2), (prefix, 0), value=True)[:, :, None]
