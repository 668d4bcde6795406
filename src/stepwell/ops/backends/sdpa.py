"""PyTorch's scaled_dot_product_attention, one call per group of equal-length sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepwell.ops.packing import Segments

CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Setting the order costs the host some 40 us a call. PyTorch's own first choice on Hopper runs at about 330 TFLOP/s and cuDNN's
# kernel at about twice that (pytorch#142132), so it pays from 40 us of saved time on.
WORTH_FLOPS = 2 * 40e-6 * 330e12


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim)"""
    parts = []
    for group in segments.groups:
        # (count, length, heads, head_dim) -> (count, heads, length, head_dim)
        queries, keys, values = (group.rows(t).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values)
        parts.append(out.transpose(1, 2).reshape(group.count * group.length, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same; where the sequences are long enough to pay for asking, cuDNN's kernel comes first."""
    flops = 4 * q.shape[1] * q.shape[2] * sum(length**2 for length in segments.lengths)
    if flops < WORTH_FLOPS:
        return attend(q, k, v, segments)
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return attend(q, k, v, segments)
