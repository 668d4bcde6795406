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
