"""Attention as two matrix products and a softmax over blocks of queries: the CPU's bfloat16 path.

PyTorch's CPU flash kernel does not use the wide bfloat16 instructions well; oneDNN's batched matmul does.
Probabilities are rounded to bfloat16 before the second product: 3e-3 largest error against float64 on unit inputs,
SDPA's is 1.5e-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwell.ops.packing import Segments

BLOCK = 256  # queries at a time, so that a block's scores stay in cache
WHOLE = 512  # sequences up to this length are not worth splitting


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
    parts = [_dense(*(group.rows(t) for t in (q, k, v))) for group in segments.groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(count, length, heads, head_dim) each -> (count · length, heads · head_dim)"""
    count, length, heads, dim = q.shape
    q = (q * dim**-0.5).transpose(1, 2).reshape(count * heads, length, dim)
    k = k.transpose(1, 2).reshape(count * heads, length, dim).transpose(1, 2)
    v = v.transpose(1, 2).reshape(count * heads, length, dim)
    if length <= WHOLE:
        out = torch.bmm(torch.softmax(torch.bmm(q, k), dim=-1), v)
    else:
        out = torch.empty_like(v)
        for start in range(0, length, BLOCK):
            rows = q[:, start : start + BLOCK]
            out[:, start : start + BLOCK] = torch.bmm(torch.softmax(torch.bmm(rows, k), dim=-1), v)
    return out.view(count, heads, length, dim).transpose(1, 2).reshape(count * length, heads * dim)
