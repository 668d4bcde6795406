"""Adaptive layer norm and gated residuals over a packed batch (DiT's adaLN-Zero: Peebles & Xie 2023, §3.2).

Everything here is row-wise or element-wise, so a row's result does not depend on its neighbours in the packed matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.packing import Segments


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) · scale + shift, with one shift and scale per sequence.

    x: (tokens, channels); shift, scale (which already holds its "1 +"): (sequences, channels), or (channels,) for one.
    """
    if shift.ndim == 1:
        return F.layer_norm(x, x.shape[-1:], scale, shift, eps)
    # one fused norm-and-affine per sequence: measured faster on a CPU than one norm and a broadcast affine
    parts = [F.layer_norm(rows, rows.shape[-1:], scale[i], shift[i], eps) for i, rows in enumerate(segments.split(x))]
    return torch.cat(parts)


def gated_add(x: Tensor, gate: Tensor, update: Tensor, segments: Segments) -> Tensor:
    """x + gate · update, with one gate per sequence.

    x, update: (tokens, channels); gate: (sequences, channels), or (channels,) for one sequence.
    """
    if gate.ndim == 1:
        return torch.addcmul(x, gate, update)
    out = torch.empty_like(x)
    for group in segments.groups:
        per_sequence = gate[group.first : group.last, None]
        torch.addcmul(group.rows(x), per_sequence, group.rows(update), out=group.rows(out))
    return out
