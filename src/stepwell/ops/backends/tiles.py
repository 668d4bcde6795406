"""A grid of tokens cut into tiles: which token is in which tile, and which tiles a window around a tile covers.

Tiles run in row-major order, and so do the tokens of a tile. The last tile of an axis is smaller where the grid is no multiple.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.ops.packing import Lane, Segments

Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True, slots=True)
class Tiles:
    """`counts` tiles along each axis; `tokens` of each tile are places in the row-major grid."""

    counts: Grid
    tokens: tuple[Tensor, ...]

    @classmethod
    def of(cls, grid: Grid, tile: Grid) -> Tiles:
        place = torch.arange(math.prod(grid)).view(grid)
        counts = tuple(-(-size // step) for size, step in zip(grid, tile, strict=True))
        tokens = []
        for corner in itertools.product(*(range(count) for count in counts)):
            t, r, c = (slice(i * step, (i + 1) * step) for i, step in zip(corner, tile, strict=True))
            tokens.append(place[t, r, c].flatten())
        return cls((counts[0], counts[1], counts[2]), tuple(tokens))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Tokens as one table (tiles, largest tile), filled up with 0, and which of its entries are real, bool."""
        table = torch.nn.utils.rnn.pad_sequence(list(self.tokens), batch_first=True)
        sizes = torch.tensor([len(tokens) for tokens in self.tokens])
        return table, torch.arange(table.shape[1]) < sizes[:, None]

    def windows(self, window: Grid) -> list[tuple[Tensor, Tensor]]:
        """(query tokens, key tokens) of every window there is, each query in exactly one.

        A window is moved inwards at the edges and never cut, so that all queries see as much (Zhang et al. 2025, "Fast Video
        Generation with Sliding Tile Attention"). Along an axis it is 2 · (size // 2) + 1 tiles wide, as in the authors'
        kernel: an even size covers one tile more than it says.
        """
        spans = [min(count, 2 * (size // 2) + 1) for count, size in zip(self.counts, window, strict=True)]
        queries: dict[Grid, list[Tensor]] = {}
        for index, tile in enumerate(itertools.product(*(range(count) for count in self.counts))):
            starts = [
                max(0, min(i - size // 2, count - span))
                for i, size, count, span in zip(tile, window, self.counts, spans, strict=True)
            ]
            queries.setdefault((starts[0], starts[1], starts[2]), []).append(self.tokens[index])
        return [(torch.cat(tokens), self._within(start, spans)) for start, tokens in queries.items()]

    def _within(self, start: Grid, spans: list[int]) -> Tensor:
        axes = (range(first, first + span) for first, span in zip(start, spans, strict=True))
        _, rows, columns = self.counts
        return torch.cat([self.tokens[(t * rows + r) * columns + c] for t, r, c in itertools.product(*axes)])


def clipped(tile: Grid, grid: Grid) -> Grid:
    """The tile, no larger than the grid."""
    t, r, c = (min(pair) for pair in zip(tile, grid, strict=True))
    return t, r, c


def by_sequence(
    attend: Callable[[Lane, Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> Tensor:
    """Each sequence of a packed batch by itself: (length, heads, head_dim) each -> (length, heads · head_dim)"""
    parts = zip(segments.lanes, segments.split(q), segments.split(k), segments.split(v), strict=True)
    outs = [attend(lane, *qkv) for lane, *qkv in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs)
