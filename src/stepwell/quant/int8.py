"""int8 linears: weights alone, or weights and activations.

Weights are symmetric with one scale per output channel: W ≈ s · W₈, |W₈| ≤ 127 (the scheme of Dettmers et al. 2022,
"LLM.int8()", §2.1, without its outlier columns).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.ops.linear import LinearGelu, onednn_linear
from stepwell.ops.packing import Segments

LEVELS = 127  # -128 is left out, so that the range is symmetric
TINIEST = 1e-12  # a row of zeros needs a scale too
# Rows quantised, multiplied and scaled together. Measured on Zen 4 at 1560 rows: each call of the matmul lays the weight
# out anew, so 128 rows cost 10 % more than 512; and what is between its passes must stay in the cache, so all rows at
# once may cost 20 % more.
CHUNK_ROWS = 512


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> the same in int8, and (out,) float32 scales. A few rows at a time, so that nothing large comes and goes."""
    levels = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(len(weight), dtype=torch.float32)
    for start in range(0, len(weight), CHUNK_ROWS):
        rows = weight.detach()[start : start + CHUNK_ROWS].float()
        scales = rows.abs().amax(1).div_(LEVELS).clamp_(min=TINIEST)
        scale[start : start + CHUNK_ROWS] = scales
        levels[start : start + CHUNK_ROWS] = rows.div(scales[:, None]).round_().clamp_(-LEVELS, LEVELS)
    return levels, scale


class Int8WeightOnly(nn.Module):
    """x (s · W₈)ᵀ + b in the precision of x; the weight is widened at each call, and so held in int8 only.

    Widening costs little beside a product of many rows. torch's own `_weight_int8pack_mm`, made for a few rows, was
    measured at 0.36× of packed bf16 from 96 rows on; this at 0.71× to 0.94×.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight, scale = quantised(plain.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(plain.weight.dtype)[:, None])
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())
        self.gelu = isinstance(plain, LinearGelu)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        weight = self.weight.to(x.dtype).mul_(self.scale)
        if x.device.type == "cpu":
            return onednn_linear(x, weight, self.bias, gelu=self.gelu)
        y = F.linear(x, weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y


class Int8Dynamic(nn.Module):
    """(t · X₈)(s · W₈)ᵀ + b, with a scale t per row of x found anew at each call, and sums in int32.

    Such sums are exact in any order, so a row's bits depend on nothing but the row. Around `torch._int_mm` everything is
    element-wise, in float32. `onednn::qlinear_pointwise` would fuse the scales, but knows none per row, and creates no
    primitive here.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight, scale = quantised(plain.weight)
        self.register_buffer("weight", weight.t().contiguous())  # (in, out), measured 1.3× faster than a transposed view
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros_like(scale) if plain.bias is None else plain.bias.detach().float())
        self.gelu = isinstance(plain, LinearGelu)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        if len(x) <= CHUNK_ROWS:
            return self._rows(x).to(x.dtype)
        out = x.new_empty(len(x), self.out_features)
        for start in range(0, len(x), CHUNK_ROWS):
            out[start : start + CHUNK_ROWS] = self._rows(x[start : start + CHUNK_ROWS])
        return out

    def _rows(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out) float32"""
        most = x.abs().amax(1, keepdim=True).float().clamp_(min=TINIEST)
        levels = torch.mul(x.float(), LEVELS / most).round_().to(torch.int8)
        y = torch._int_mm(levels, self.weight).float().mul_(most.div_(LEVELS))
        y = torch.addcmul(self.bias, y, self.scale, out=y)
        return gelu(y) if self.gelu else y


def gelu(y: Tensor) -> Tensor:
    """GELU with the tanh approximation, as y · sigmoid(2 √(2/π) (y + 0.044715 y³)): on a CPU 2.4× faster than
    `F.gelu`, and as near to the exact value (4e-7). y: float32"""
    slope = 2 * math.sqrt(2 / math.pi)
    inner = torch.addcmul(torch.tensor(slope), y, y, value=slope * 0.044715).mul_(y)
    return inner.sigmoid_().mul_(y)
