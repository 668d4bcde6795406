"""The seam at the arithmetic between linears and attention: fused kernels and compiled ones attach here.

It is the same for every row of a packed batch but for a few vectors per sequence, so whatever replaces it needs no more of
the layout than which sequence a row belongs to. `PLAIN` is eager PyTorch: what runs unless a pass says otherwise, what the
others are tried against when they are chosen, and what their tests compare them with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepwell.ops.modulate import gated_add, modulated_norm
from stepwell.ops.norm import rms_norm
from stepwell.ops.packing import JointLayout, Lane, Segments
from stepwell.ops.rope import rotate

# LayerNorm(x) · scale + shift, of x, shift, scale: x (tokens, channels); vectors (sequences, channels), or (channels,) for one
# sequence
ModulatedNorm = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
# sum = x + gate · update, and LayerNorm(sum) · scale + shift, of x, gate, update, shift, scale: shapes as above
GatedAddNorm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Segments], tuple[Tensor, Tensor]]
# RMS norm over head_dim, times a weight, then rotation, in float32; the result has the input's dtype. Of queries and keys (joint
# tokens, 2, heads, head_dim); weights, (2, 1, head_dim) float32 for all rows, or one for the text's and one for the image's,
# or one (2, heads, head_dim): heads are normed together then; rotary (joint tokens, head_dim / 2) complex64
NormRotate = Callable[[Tensor, tuple[Tensor, ...], Tensor, JointLayout], Tensor]


@dataclass(frozen=True, slots=True)
class RowKernels:
    """One implementation of all of it."""

    modulated_norm: ModulatedNorm
    gated_add_norm: GatedAddNorm
    norm_rotate: NormRotate


def gated_add_norm(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """See GatedAddNorm."""
    total = gated_add(x, gate, update, segments)
    return total, modulated_norm(total, shift, scale, segments)


def norm_rotate(queries_keys: Tensor, weights: tuple[Tensor, ...], rotary: Tensor, layout: JointLayout) -> Tensor:
    """See NormRotate."""
    over = (-2, -1) if weights[0].shape[1] > 1 else (-1,)
    normed = rms_norm(queries_keys.float(), over)
    if len(weights) == 1:
        normed.mul_(weights[0])
    else:
        for views, weight in zip((layout.text_views(normed), layout.image_views(normed)), weights, strict=True):
            for rows in views:
                rows.mul_(weight)
    return rotate(normed, rotary).to(queries_keys.dtype)


PLAIN = RowKernels(modulated_norm, gated_add_norm, norm_rotate)


class RowMaths(nn.Module):
    """Where a model norms, modulates, adds and rotates. Eager PyTorch until a pass sets `kernels`."""

    kernels: RowKernels

    def __init__(self) -> None:
        super().__init__()
        self.kernels = PLAIN

    def modulated_norm(self, x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
        return self.kernels.modulated_norm(x, shift, scale, segments)

    def gated_add_norm(
        self, x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        return self.kernels.gated_add_norm(x, gate, update, shift, scale, segments)

    def norm_rotate(self, queries_keys: Tensor, weights: tuple[Tensor, ...], rotary: Tensor, layout: JointLayout) -> Tensor:
        together = weights[0].shape[1] > 1  # has no fused form yet
        return (norm_rotate if together else self.kernels.norm_rotate)(queries_keys, weights, rotary, layout)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest value


@torch.no_grad()
def largest_difference(kernels: RowKernels, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> float:
    """How far kernels are from `PLAIN`, as a share of what a dtype's rounding allows: above 1 they are wrong.

    Tried on random rows, one sequence and three of different lengths, with a model's own width. What compiles on first
    use has then been compiled.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for lengths in ([(3, 6)], [(2, 5), (4, 3), (4, 3)]):
        layout = JointLayout([Lane(None, 1, text, (1, 1, image)) for text, image in lengths])
        tokens, count, width = layout.joint.total, len(lengths), heads * head_dim

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        x, update = random(tokens, width).to(dtype), random(tokens, width).to(dtype)
        vectors = random(3, count, width).to(dtype)
        gate, shift, scale = vectors if count > 1 else vectors[:, 0]
        queries_keys = random(tokens, 3, heads, head_dim).to(dtype)[:, :2]
        weights = (random(2, 1, head_dim), random(2, 1, head_dim))
        rotary = torch.polar(torch.ones(tokens, head_dim // 2), torch.randn(tokens, head_dim // 2, generator=generator))
        rotary = rotary.to(device)
        results = [
            (
                made.modulated_norm(x, shift, scale, layout.joint),
                *made.gated_add_norm(x, gate, update, shift, scale, layout.joint),
                made.norm_rotate(queries_keys, weights, rotary, layout),
                made.norm_rotate(queries_keys, weights[:1], rotary, layout),
            )
            for made in (kernels, PLAIN)
        ]
        for got, wanted in zip(*results, strict=True):
            share = ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max() / TOLERANCE[dtype]).item()
            worst = max(worst, share if share == share else float("inf"))
    return worst
