"""fp8 linears: e4m3 weights and activations with a scale per row of each, multiplied by the GPU's own fp8 units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.ops.linear import LinearGelu
from stepwell.ops.packing import Segments

LARGEST = 448.0  # of e4m3 (Micikevicius et al. 2022, table 1)
TINIEST = 1e-12


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, in) -> the same in e4m3, and (rows, 1) float32 scales"""
    scale = rows.abs().amax(1, keepdim=True).float().div_(LARGEST).clamp_(min=TINIEST)
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


class Fp8(nn.Module):
    """(t · X₈)(s · W₈)ᵀ + b by `torch._scaled_mm`, whose row-wise kernels write bfloat16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight, scale = quantised(plain.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())  # (1, out)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())
        self.gelu = isinstance(plain, LinearGelu)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        levels, scale = quantised(x)
        y = torch._scaled_mm(levels, self.weight.t(), scale, self.scale, out_dtype=torch.bfloat16).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return F.gelu(y, approximate="tanh") if self.gelu else y
