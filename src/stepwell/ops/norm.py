"""Root-mean-square norm of attention queries and keys (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, over: tuple[int, ...] = (-1,), eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension or those of `over`, without a weight. x: (..., channels) float32"""
    return x * torch.rsqrt(x.square().mean(over, keepdim=True).add_(eps))
