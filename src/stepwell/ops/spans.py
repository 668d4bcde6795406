"""The layout of a packed step of a text model: new blocks of many sequences, each after what it has in a pool of pages.

Every sequence is a number of whole blocks, so all of a step is one matrix of blocks of `size` rows. A row sees its own
block and all earlier blocks of its sequence, those in the pool included. Attention is called block by block on a CPU, and
linears whose bits depend on the number of rows run block by block too: then a row's bits depend neither on the sequences
beside it nor on how its own was cut into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.packing import Segments
from stepwell.ops.rows import TOLERANCE


@dataclass(frozen=True, slots=True)
class Span:
    """New rows of one sequence: token ids, whole blocks of them, after the blocks that `pages` hold. `wanted` are the rows
    whose logits are asked for, all in the last block."""

    ids: Sequence[int]
    pages: Sequence[int] = ()
    wanted: Sequence[int] = ()


class SpanLayout:
    """Spans, laid out. ids, positions: (rows,) int64; pages: (pages of all spans,) int64; wanted: (rows asked for,) int64."""

    def __init__(self, spans: Sequence[Span], size: int, device: torch.device):
        self.size = size
        self.counts = [len(span.ids) // size for span in spans]  # new blocks of each
        self.pasts = [len(span.pages) for span in spans]
        self.blocks = Segments([size] * sum(self.counts))

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.ids = tensor([i for span in spans for i in span.ids])
        starts = [len(span.pages) * size for span in spans]
        self.positions = tensor([start + i for start, span in zip(starts, spans, strict=True) for i in range(len(span.ids))])
        self.pages = tensor([page for span in spans for page in span.pages])
        wanted, row = [], 0
        for span in spans:
            wanted += [row + i for i in span.wanted]
            row += len(span.ids)
        self.wanted = tensor(wanted)
        self.asked = Segments([len(span.wanted) for span in spans if span.wanted])

    @cached_property
    def table(self) -> Tensor:
        """(new blocks, 3) int64: where in `pages` those of its span begin, how many they are, and its span's first block"""
        made, block, page = [], 0, 0
        for count, pages in zip(self.counts, self.pasts, strict=True):
            made += [(page, pages, block)] * count
            block, page = block + count, page + pages
        return torch.tensor(made, dtype=torch.int64, device=self.ids.device)


SpanKernel = Callable[[Tensor, Tensor, Tensor, Tensor, SpanLayout], Tensor]
"""q: (rows, heads, head_dim); k, v: (rows, key heads, head_dim); pool: keys and values of all there is, (2, pages, size, key
heads, head_dim); layout -> (rows, heads · head_dim)"""


def dense_spans(q: Tensor, k: Tensor, v: Tensor, pool: Tensor, layout: SpanLayout) -> Tensor:
    """A SpanKernel by scaled_dot_product_attention, one sequence after the other."""
    size = layout.size
    past = pool.index_select(1, layout.pages)
    outs, row, page = [], 0, 0
    for count, pages in zip(layout.counts, layout.pasts, strict=True):
        rows = slice(row, row + count * size)
        keys, values = (
            torch.cat((kept[page : page + pages].flatten(0, 1), new[rows])) for kept, new in zip(past, (k, v), strict=True)
        )
        outs.append(_attend_one(q[rows], keys, values, size))
        row, page = rows.stop, page + pages
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """One sequence: q (rows, heads, head_dim), k and v (all rows up to here, key heads, head_dim)"""
    count, past = len(q) // size, len(k) - len(q)
    if count == 1:
        return _dense(q, k, v)
    if q.device.type == "cpu":
        ends = range(size, len(q) + 1, size)
        return torch.cat([_dense(q[end - size : end], k[: past + end], v[: past + end]) for end in ends])
    seen = (torch.arange(count, device=q.device) + 1).repeat_interleave(size) * size + past
    return _dense(q, k, v, torch.arange(len(k), device=q.device) < seen[:, None])


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(rows, heads, head_dim) after (keys, key heads, head_dim) -> (rows, heads · head_dim)"""
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)


@torch.no_grad()
def largest_difference(kernel: SpanKernel, heads: tuple[int, int], head_dim: int, size: int, like: Tensor) -> float:
    """How far a kernel is from `dense_spans`, as a share of what the rounding of `like` allows: above 1 it is wrong.

    heads: of queries, and of keys. Tried on a sequence with pages and several new blocks, and on two more, in random numbers.
    """
    layout = SpanLayout([Span(range(3 * size), (4, 0)), Span(range(size), (2,)), Span(range(2 * size))], size, like.device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    q, k, v = (random(6 * size, count, head_dim) for count in (heads[0], heads[1], heads[1]))
    pool = random(2, 5, size, heads[1], head_dim)
    got, wanted = kernel(q, k, v, pool, layout).float(), dense_spans(q, k, v, pool, layout).float()
    share = ((got - wanted).abs().max() / wanted.abs().max() / TOLERANCE[like.dtype]).item()
    return share if share == share else float("inf")
