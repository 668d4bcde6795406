"""SageAttention 2 and 3: attention on quantised queries and keys, one call per group of equal-length sequences.

Reference: thu-ml/SageAttention, `sageattn` in sageattention/core.py and `sageattn3_blackwell` in sageattn3/api.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwell.ops.packing import Segments


@dataclass(frozen=True, slots=True)
class Sage:
    """`function` is sageattention.sageattn. It scales logits by head_dim ** -0.5 unless told otherwise."""

    function: Callable[..., Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        parts = []
        for group in segments.groups:
            queries, keys, values = (group.rows(t) for t in (q, k, v))  # (count, length, heads, head_dim)
            out = self.function(queries, keys, values, tensor_layout="NHD", is_causal=False)
            parts.append(out.reshape(group.count * group.length, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Sage3:
    """`function` is sageattn3.sageattn3_blackwell: (batch, heads, length, head_dim). It subtracts the mean from the keys it is
    given in place, so it gets a copy."""

    function: Callable[..., Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        parts = []
        for group in segments.groups:
            queries, keys, values = (group.rows(t).transpose(1, 2) for t in (q, k, v))
            keys = keys.clone(memory_format=torch.contiguous_format)
            out = self.function(queries.contiguous(), keys, values.contiguous(), is_causal=False)
            parts.append(out.transpose(1, 2).reshape(group.count * group.length, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
