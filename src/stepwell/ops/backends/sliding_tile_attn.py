"""The vendor's kernel of sliding tile attention: `sliding_tile_attention` of st_attn (hao-ai-lab/FastVideo, csrc/attn).

It knows three grids, tiles of 6×8×8, and wants (batch, heads, tokens, head_dim) in the order of tiles with the text after them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from stepwell.errors import Unsupported
from stepwell.ops.backends.sliding_tile_torch import TILE, WindowsOf
from stepwell.ops.backends.tiles import Grid, Tiles, by_sequence
from stepwell.ops.packing import Lane, Segments

WITH_TEXT: tuple[Grid, ...] = ((30, 48, 80),)
WITHOUT_TEXT: tuple[Grid, ...] = ((36, 48, 48), (18, 48, 80))
LONGEST_TEXT = 256


class VendorSlidingTile:
    """The kernel of one layer."""

    def __init__(self, function: Callable[..., Tensor], windows: WindowsOf):
        self.function, self.windows = function, windows
        self._order = lru_cache(maxsize=4)(_tiled_order)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        return by_sequence(self._sequence, q, k, v, segments)

    def _sequence(self, lane: Lane, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check(lane)
        order = self._order(lane.grid, lane.prefix, q.device)
        tiled = (t[order].transpose(0, 1)[None].contiguous() for t in (q, k, v))
        windows = [list(window) for window in self.windows(lane.step, lane.steps)]
        out = self.function(*tiled, windows, lane.prefix, lane.prefix > 0, _shape(lane.grid))  # (1, heads, tokens, head_dim)
        back = torch.empty_like(q, memory_format=torch.contiguous_format)
        back[order] = out[0].transpose(0, 1)
        return back.flatten(1)


def _tiled_order(grid: Grid, prefix: int, device: torch.device) -> Tensor:
    """Rows of [text; grid] in the kernel's order, (tokens,)"""
    tiles = torch.cat(Tiles.of(grid, TILE).tokens) + prefix
    return torch.cat((tiles, torch.arange(prefix))).to(device)


def _check(lane: Lane) -> None:
    known = WITH_TEXT if lane.prefix else WITHOUT_TEXT
    if lane.grid in known and lane.prefix <= LONGEST_TEXT:
        return
    grids = " or ".join(_shape(grid) for grid in known)
    text = f"with up to {LONGEST_TEXT} text tokens" if lane.prefix else "without text"
    raise Unsupported(
        f"sliding_tile_attn: the library st_attn knows sequences of {grids} tokens {text}; this request has "
        f"{_shape(lane.grid)} and {lane.prefix} of text. Use sliding_tile_torch",
        param="attention_backend",
    )


def _shape(grid: Grid) -> str:
    return "x".join(str(size) for size in grid)
