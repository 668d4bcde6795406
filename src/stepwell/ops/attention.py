"""The seam at attention: a module without parameters whose kernel a pass may replace, layer by layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from stepwell.ops.backends import sdpa
from stepwell.ops.packing import Segments


class AttentionKernel(Protocol):
    """Softmax attention inside each sequence of a packed batch.

    q, k, v: (tokens, heads, head_dim) -> (tokens, heads · head_dim). Logits are scaled by head_dim ** -0.5.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor: ...


class Attention(nn.Module):
    """Where a model attends. Plain SDPA until a pass sets `kernel`."""

    kernel: AttentionKernel

    def __init__(self) -> None:
        super().__init__()
        self.kernel = sdpa.attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        return self.kernel(q, k, v, segments)
