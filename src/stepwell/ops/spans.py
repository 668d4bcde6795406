"""The layout of a packed step of a text model: new blocks of many sequences, each after what it has in a pool of pages.

Every sequence is a number of whole blocks, so all of a step is one matrix of blocks of `size` rows. A row sees its own
block and all earlier blocks of its sequence, those in the pool included. Attention is called block by block on a CPU, and
linears whose bits depend on the number of rows run block by block too: then a row's bits depend neither on the sequences
beside it nor on how its own was cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.packing import Segments


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        """q: (rows, heads, head_dim); k, v: (rows, key heads, head_dim); past: keys and values of all pages, (pages, size, key
        heads, head_dim) each -> (rows, heads · head_dim)"""
        outs, row, page = [], 0, 0
        for count, pages in zip(self.counts, self.pasts, strict=True):
            rows = slice(row, row + count * self.size)
            keys, values = (
                torch.cat((kept[page : page + pages].flatten(0, 1), new[rows]))
                for kept, new in zip(past, (k, v), strict=True)
            )  # fmt: skip
            outs.append(self._attend_one(q[rows], keys, values))
            row, page = rows.stop, page + pages
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence: q (rows, heads, head_dim), k and v (all rows up to here, key heads, head_dim)"""
        count, past = len(q) // self.size, len(k) - len(q)
        if count == 1:
            return _dense(q, k, v)
        if q.device.type == "cpu":
            ends = range(self.size, len(q) + 1, self.size)
            return torch.cat([_dense(q[end - self.size : end], k[: past + end], v[: past + end]) for end in ends])
        seen = (torch.arange(count, device=q.device) + 1).repeat_interleave(self.size) * self.size + past
        return _dense(q, k, v, torch.arange(len(k), device=q.device) < seen[:, None])


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(rows, heads, head_dim) after (keys, key heads, head_dim) -> (rows, heads · head_dim)"""
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)
