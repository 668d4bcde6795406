"""Linear layers: the seam where weights are quantised, sharded, adapted, or packed for the CPU.

Models build `Linear` for what sees packed batches, or `LinearGelu` where a GELU follows at once so that a kernel may fuse
the two, and plain `nn.Linear` for what runs once per request. What passes put in their place takes the same arguments.
`PackedLinear` is oneDNN with the weight laid out for its kernels beforehand; `BySegment` calls a layer sequence by
sequence, where a kernel's bits depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.ops.packing import Segments

LEAST_ROWS = 16


class Linear(nn.Linear):
    """x Wᵀ + b over a packed batch: (tokens, in) -> (tokens, out). It needs no `segments`; what replaces it may."""

    def forward(self, input: Tensor, segments: Segments | None = None) -> Tensor:
        return super().forward(input)


class LinearGelu(Linear):
    """gelu(x Wᵀ + b) with the tanh approximation."""

    def forward(self, input: Tensor, segments: Segments | None = None) -> Tensor:
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
        self.gelu = isinstance(plain, LinearGelu)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        return onednn_linear(x, self.packed, self.bias, gelu=self.gelu)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor:
    """oneDNN's x Wᵀ + b, and its fused tanh GELU. weight: (out, in) in the precision of x, plain or laid out beforehand."""
    if len(x) < LEAST_ROWS:
        return onednn_linear(F.pad(x, (0, 0, 0, LEAST_ROWS - len(x))), weight, bias, gelu=gelu)[: len(x)]
    name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


class BySegment(nn.Module):
    """Calls a layer once per sequence, so that each has the rows, and with them the bits, that it has alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        if len(segments.lengths) == 1:
            return self.layer(x)
        return torch.cat([self.layer(rows) for rows in segments.split(x)])


@torch.no_grad()
def is_row_invariant(
    plain: nn.Linear, dtype: torch.dtype, convert: Callable[[nn.Linear], nn.Module], most_rows: int = 1024
) -> bool:
    """Whether what `convert` makes of linears of this shape gives a row the same bits in a short matrix as in a long one,
    tried on some of each.

    Kernels may sum in another order for another number of rows; then packing requests would change their pictures.
    In every second output the probe's halves cancel, so that what is left of the sum is its rounding, which tells the
    order; the others show what comes after the sum. Only the shape and kind of `plain` are looked at; it may live on the
    meta device.
    """
    generator = torch.Generator().manual_seed(0)
    probe = type(plain)(plain.in_features, plain.out_features)
    half = plain.in_features // 2
    probe.weight.zero_()
    probe.bias.zero_()
    probe.weight[:, : 2 * half] = torch.randn(plain.out_features, 2 * half, generator=generator)
    probe.weight[::2, half : 2 * half] = -probe.weight[::2, :half]
    x = torch.zeros(most_rows, plain.in_features)
    x[:, :half] = torch.randn(most_rows, half, generator=generator)
    x[:, half : 2 * half] = x[:, :half]
    x = x.to(dtype)
    probe = probe.to(dtype)
    layer = convert(probe)
    whole = layer(x)
    places = ((0, 1), (0, 4), (7, 16), (16, 48), (0, 96), (96, 100), (0, 256), (300, 300), (512, 512), (0, 900))
    return all(torch.equal(layer(x[first : first + rows].contiguous()), whole[first : first + rows]) for first, rows in places)
