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


@torch.no_grad()
def is_row_invariant(plain: nn.Linear, dtype: torch.dtype, *, packed: bool, most_rows: int = 1024) -> bool:
    """Whether linears of this shape give a row the same bits in a short matrix as in a long one, tried on row counts.

    Kernels may sum in another order for another number of rows; then packing requests would change their pictures.
    The probe's halves cancel, so that what is left of the sum is its rounding, which tells the order. Only the shape and
    kind of `plain` are looked at; it may live on the meta device.
    """
    generator = torch.Generator().manual_seed(0)
    probe = type(plain)(plain.in_features, plain.out_features)
    half = plain.in_features // 2
    probe.weight.zero_()
    probe.bias.zero_()
    probe.weight[:, :half] = torch.randn(plain.out_features, half, generator=generator)
    probe.weight[:, half : 2 * half] = -probe.weight[:, :half]
    x = torch.zeros(most_rows, plain.in_features)
    x[:, :half] = torch.randn(most_rows, half, generator=generator)
    x[:, half : 2 * half] = x[:, :half]
    x = x.to(dtype)
    probe = probe.to(dtype)
    layer = PackedLinear(probe) if packed else probe
    whole = layer(x)
    rows_tried = (1, 4, 16, 48, 96, 100, 256, 300, 512, 900)
    return all(torch.equal(layer(x[:rows].contiguous()), whole[:rows]) for rows in rows_tried)
