"""Linear layers: the seam where weights are quantised, sharded, adapted, or packed for the CPU.

Models build `nn.Linear`, or `LinearGelu` where a GELU follows at once so that a kernel may fuse the two.
`PackedLinear` takes the place of either on a CPU: oneDNN with the weight laid out for its kernels beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_ROWS = 16


class LinearGelu(nn.Linear):
    """gelu(x Wᵀ + b) with the tanh approximation."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(super().forward(input), approximate="tanh")


class PackedLinear(nn.Module):
    """A CPU linear over oneDNN's own weight layout, with a fused GELU if it replaces a `LinearGelu`.

    float32 and bfloat16. Kernels for a handful of rows sum in another order, so shorter inputs are padded to LEAST_ROWS;
    above that `is_row_invariant` tells whether a row's result depends on the number of rows.
    """

    def __init__(self, plain: nn.Linear, rows: int = 512):
        super().__init__()
        weight = plain.weight.detach()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias = None if plain.bias is None else plain.bias.detach()
        self.epilogue = ("gelu", "tanh") if isinstance(plain, LinearGelu) else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        name, algorithm = self.epilogue
        if len(x) < LEAST_ROWS:
            return self(F.pad(x, (0, 0, 0, LEAST_ROWS - len(x))))[: len(x)]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)


def is_row_invariant(layer: nn.Module, in_features: int, dtype: torch.dtype, most_rows: int = 1024) -> bool:
    """Whether `layer` gives a row the same bits in a short matrix as in a long one, tried on a few row counts.

    Kernels may sum in another order for another number of rows; then packing requests would change their pictures.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(most_rows, in_features, generator=generator).to(dtype)
    whole = layer(x)
    for rows in (1, 4, 16, 48, 96, 100, 256, 300, 512, 900):
        if rows < most_rows and not torch.equal(layer(x[:rows].contiguous()), whole[:rows]):
            return False
    return True
