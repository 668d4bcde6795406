"""A mixture of experts: gated feed-forwards of which every row takes a few, in one product per expert that is present."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.ops.linear import onednn_linear
from stepwell.ops.packing import Segments


class Experts(nn.Module):
    """Σ wₑ · down(silu(gate(x)) · up(x)) over each row's experts.

    Weights of all experts lie in one matrix each, (experts · out, in). Rows are sorted by expert; on a GPU the products are
    one grouped call (bfloat16), elsewhere a loop. A row's sum goes over its experts in its own order, whoever else is there.
    `by_block` runs block by block, where a CPU's kernels sum in an order that depends on the number of rows.
    """

    def __init__(self, count: int, width: int, inner: int):
        super().__init__()
        self.count = count
        self.gate = nn.Parameter(torch.empty(count * inner, width))
        self.up = nn.Parameter(torch.empty(count * inner, width))
        self.down = nn.Parameter(torch.empty(count * width, inner))
        self.by_block = False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, blocks: Segments) -> Tensor:
        """x: (rows, width); ids, weights: (rows, experts of a row) -> (rows, width)"""
        if self.by_block and len(blocks.lengths) > 1:
            parts = zip(*(blocks.split(t) for t in (x, ids, weights)), strict=True)
            return torch.cat([self._mix(*part) for part in parts])
        return self._mix(x, ids, weights)

    def _mix(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        each = ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.count)
        rows = x[order.div(each, rounding_mode="floor")]
        is_grouped = x.is_cuda and x.dtype == torch.bfloat16
        made = self._grouped(rows, counts) if is_grouped else self._looped(rows, counts.tolist())
        made = torch.empty_like(made).index_copy_(0, order, made).view(len(x), each, -1)
        weights = weights.to(x.dtype)
        total = made[:, 0] * weights[:, :1]
        for k in range(1, each):
            total = total + made[:, k] * weights[:, k : k + 1]
        return total

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        gate, up, down = (w.view(self.count, -1, w.shape[1]).transpose(1, 2) for w in (self.gate, self.up, self.down))
        inner = F.silu(torch._grouped_mm(rows, gate, offs=ends)) * torch._grouped_mm(rows, up, offs=ends)
        return torch._grouped_mm(inner, down, offs=ends)

    def _looped(self, rows: Tensor, counts: list[int]) -> Tensor:
        def each(x: Tensor, weights: Tensor) -> Tensor:
            weights = weights.view(self.count, -1, weights.shape[1])
            return torch.cat([product(own, weights[e]) for e, own in enumerate(x.split(counts)) if len(own)])

        # one SiLU of all rows: PyTorch's rounds what is left of a vector's width otherwise, and all rows fill their vectors
        return each(F.silu(each(rows, self.gate)) * each(rows, self.up), self.down)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ; on a CPU by kernels that give a row the same bits in any company, where there are such."""
    return F.linear(x, weight) if x.is_cuda else onednn_linear(x, weight, None, gelu=False)


class OneDnnLinear(nn.Module):
    """What `product` is on a CPU, as a layer: for probing whether a row's bits depend on the number of rows."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.plain.weight, self.plain.bias, gelu=False)
