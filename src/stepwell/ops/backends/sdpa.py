"""PyTorch's scaled_dot_product_attention, one call per group of equal-length sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.packing import Segments


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
    parts = []
    for group in segments.groups:
        # (count, length, heads, head_dim) -> (count, heads, length, head_dim)
        queries, keys, values = (group.rows(t).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values)
        parts.append(out.transpose(1, 2).reshape(group.count * group.length, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
