"""Triton attention for texts: every block of a step in one launch, which reads finished blocks where they lie in the pool.

A program has one block's rows of one head, and goes over the pages its sequence has and then its new blocks up to its own,
with a running softmax in float32 (T. Dao et al. 2022, "FlashAttention", algorithm 1). A block-causal mask is that bound and
nothing more, so no program computes what it may not see, and none depends on another's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty

from stepwell.ops.spans import SpanLayout

LEAST = 16  # a matrix unit's smallest side


@triton.jit
def _seen(  # noqa: PLR0913
    q, keys, values, row_stride, factor, size, width, top, total, out, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One more tile of keys: the running maximum, the sum of exponentials, and what they weigh."""
    row, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here = (row[:, None] < size) & (at[None] < width)
    places = row[:, None] * row_stride + at[None]
    k = tl.load(keys + places, mask=here, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    scores = tl.where(row[None] < size, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - highest[:, None])
    kept = tl.exp(top - highest)
    v = tl.load(values + places, mask=here, other=0.0)
    out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return highest, total * kept + tl.sum(weights, 1), out


@triton.jit
def span_attention_kernel(  # noqa: PLR0913
    q, k, v, pool_k, pool_v, pages, table, made,
    row_stride, head_stride, key_row_stride, key_head_stride, page_stride, page_row_stride, page_head_stride,
    factor, size, width, heads, group, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """table[block]: its span's first page, how many pages there are, its span's first block. made: (rows, heads, width)"""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page, count, first = tl.load(table + 3 * block), tl.load(table + 3 * block + 1), tl.load(table + 3 * block + 2)
    row, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here = (row[:, None] < size) & (at[None] < width)
    start = block * size
    queries = tl.load(q + (start + row[:, None]) * row_stride + head * head_stride + at[None], mask=here, other=0.0)
    key_head = head // group
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(count):
        place = tl.load(pages + page + i).to(tl.int64) * page_stride + key_head * page_head_stride
        top, total, out = _seen(
            queries, pool_k + place, pool_v + place, page_row_stride, factor, size, width, top, total, out, ROWS, WIDTH
        )
    for other in range(first, block + 1):
        place = other * size * key_row_stride + key_head * key_head_stride
        top, total, out = _seen(queries, k + place, v + place, key_row_stride, factor, size, width, top, total, out, ROWS, WIDTH)
    value = (out / total[:, None]).to(made.dtype.element_ty)
    tl.store(made + ((start + row[:, None]) * heads + head) * width + at[None], value, mask=here)


def span_attention(q: Tensor, k: Tensor, v: Tensor, pool: Tensor, layout: SpanLayout) -> Tensor:
    """See ops.spans.SpanKernel."""
    rows, heads, width = q.shape
    made = empty(rows, heads * width, dtype=q.dtype, device=q.device)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    span_attention_kernel[(rows // layout.size, heads)](
        q, k, v, pool[0], pool[1], layout.pages, layout.table, made,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), *pool.stride()[1:4],
        width**-0.5, layout.size, width, heads, heads // k.shape[1],
        ROWS=max(LEAST, triton.next_power_of_2(layout.size)), WIDTH=max(LEAST, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return made
