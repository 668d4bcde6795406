"""Small layers that several families share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.ops.linear import Linear, LinearGelu
from stepwell.ops.packing import Segments

TIME_CHANNELS = 256


class Embedder(nn.Module):
    """Two linears with a SiLU between: what times, guidance scales and pooled texts are embedded by."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class QueryKeyNorm(nn.Module):
    """The weights of the RMS norms of queries and keys; `width` is that of what is normed together."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 * width))

    def per_token(self, heads: int = 1) -> Tensor:
        """(2, heads, width / heads) float32"""
        return self.weight.float().view(2, heads, -1)


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = LinearGelu(width, inner)
        self.down = Linear(inner, width)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return self.down(self.up(x, segments), segments)


def time_features(time: Tensor, channels: int = TIME_CHANNELS) -> Tensor:
    """(n,) -> (n, channels) float32: cosines, then sines, of geometrically spaced frequencies (DDPM's embedding)"""
    half = channels // 2
    exponent = -torch.log(torch.tensor(10_000.0)) * torch.arange(half, dtype=torch.float32) / half
    angle = time[:, None].float() * torch.exp(exponent).to(time.device)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
