"""Root-mean-square norm of attention queries and keys (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, without a weight. x: (..., channels) float32"""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
