"""FlashAttention 2, 3 and 4, and AMD's aiter: all sequences of a batch in one call.

All four have a `flash_attn_varlen_func` that takes packed (tokens, heads, head_dim) and the offsets of the sequences by the
same names. They differ in their other arguments and in the order of all, so arguments go by name. Reference: flash_attn_interface
and hopper/flash_attn_interface and flash_attn/cute/interface in Dao-AILab/flash-attention, aiter/ops/mha in ROCm/aiter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepwell.ops.packing import Segments


@dataclass(frozen=True, slots=True)
class VarlenAttention:
    """`function` is a library's flash_attn_varlen_func; logits are scaled by head_dim ** -0.5, its default."""

    function: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
        offsets, longest = segments.offsets(q.device), max(segments.lengths)
        out = self.function(
            q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest, causal=False
        )
        if isinstance(out, tuple):  # FlashAttention 4 and older versions of the others add the log-sum-exp, or say 1-tuple
            out = out[0]
        return out.flatten(1)
