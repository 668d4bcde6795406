"""Rotary position embedding on interleaved pairs (Su et al. 2021, eq. 34), as one complex product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_table(positions: Tensor, axes_dims: Sequence[int], theta: float = 10_000.0) -> Tensor:
    """Rotations for multi-axis positions.

    positions: (tokens, axes); axes_dims: channels of a head given to each axis -> (tokens, sum(axes_dims) / 2) complex64.
    Angles are computed in float64, as in the reference (diffusers FluxPosEmbed).
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(positions[:, axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x: (tokens, ..., head_dim) float32 by table: (tokens, head_dim / 2) complex64."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    table = table.view(table.shape[0], *(1,) * (pairs.ndim - 2), table.shape[1])
    return torch.view_as_real(pairs * table).flatten(-2)


def half_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate_half`, (tokens, 1, dim / 2) float32 each. positions: (tokens,); dim: rotated channels."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angle = positions[:, None, None].float() * frequencies
    return angle.cos(), angle.sin()


def rotate_half(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the leading channels of x: (tokens, heads, head_dim) float32, of which channel i is paired with i + dim / 2
    (GPT-NeoX's order); those beyond the table's `dim` stay."""
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
