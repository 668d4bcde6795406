"""The vendor's kernel of video sparse attention, `vsa.video_sparse_attn` (hao-ai-lab/FastVideo, csrc/attn/video_sparse_attn).

It wants (batch, heads, tokens, head_dim) in the order of tiles, each filled up with zeros to 64 tokens, and the number of
real tokens of each. Its coarse stage is scaled by a gate that models are trained with; the gate is 0 here, which leaves the fine
stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from stepwell.errors import Unsupported
from stepwell.ops.backends.block_sparse_torch import kept_tiles, tile_for
from stepwell.ops.backends.tiles import Grid, Tiles, by_sequence
from stepwell.ops.packing import Lane, Segments

ROOM = 64  # tokens of a whole tile


class VendorBlockSparse:
    """One kernel for all layers; `sparsity` is the share of tiles skipped, in [0, 1)."""

    def __init__(self, function: Callable[..., Tensor], sparsity: float):
        self.function, self.sparsity = function, sparsity
        self._places = lru_cache(maxsize=64)(_places)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        return by_sequence(self._sequence, q, k, v, segments)

    def _sequence(self, lane: Lane, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if lane.prefix:
            raise Unsupported(
                f"video_sparse_attn: the library vsa has no place for text among the tiles, and here {lane.prefix} text tokens "
                "attend together with the picture; use block_sparse_torch",
                param="attention_backend",
            )
        places, sizes = self._places(lane.grid, q.device)
        shape = (1, q.shape[1], len(sizes) * ROOM, q.shape[2])
        tiled = []
        for rows in (q, k, v):
            filled = rows.new_zeros(shape)
            filled[0, :, places] = rows.transpose(0, 1)
            tiled.append(filled)
        out = self.function(
            *tiled,
            variable_block_sizes=sizes,
            topk=kept_tiles(len(sizes), self.sparsity),
            block_size=tile_for(lane.grid),
            compress_attn_weight=torch.zeros_like(tiled[0]),
        )
        return out[0, :, places].transpose(0, 1).flatten(1)


def _places(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each token of the grid goes, (tokens,); the real tokens of each tile, (tiles,) int32"""
    tiles = Tiles.of(grid, tile_for(grid)).tokens
    places = torch.empty(sum(len(tokens) for tokens in tiles), dtype=torch.long)
    for index, tokens in enumerate(tiles):
        places[tokens] = index * ROOM + torch.arange(len(tokens))
    return places.to(device), torch.tensor([len(tokens) for tokens in tiles], dtype=torch.int32, device=device)
