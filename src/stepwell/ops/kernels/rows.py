"""Triton row kernels: what `ops.rows` describes, in one launch each, for any mix of sequences in the batch.

A program computes one row in float32 and reads which sequence's vectors are its own, so a row's result depends on nothing
else. Results are rounded where the eager twin in `ops.rows` rounds: once at the end, and the gated sum before its norm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, empty_like, view_as_real

from stepwell.ops.packing import JointLayout, Segments
from stepwell.ops.rows import RowKernels

EPS = 1e-6
WIDE = 2048  # channels from which a row is worth eight warps


@triton.jit
def modulated_norm_kernel(  # noqa: PLR0913
    x, shift, scale, owners, out, x_stride, shift_stride, scale_stride, channels, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """out[row] = LayerNorm(x[row]) · scale[owner] + shift[owner]"""
    row = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + row)
    at = tl.arange(0, BLOCK)
    here = at < channels
    value = tl.load(x + row * x_stride + at, mask=here, other=0.0).to(tl.float32)
    centred = tl.where(here, value - tl.sum(value, 0) / channels, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
    factor = tl.load(scale + owner * scale_stride + at, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(shift + owner * shift_stride + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * channels + at, (normed * factor + offset).to(out.dtype.element_ty), mask=here)


@triton.jit
def gated_add_norm_kernel(  # noqa: PLR0913
    x, update, gate, shift, scale, owners, total, out,
    x_stride, update_stride, gate_stride, shift_stride, scale_stride, channels, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """total[row] = x[row] + gate[owner] · update[row]; out[row] = LayerNorm(total[row]) · scale[owner] + shift[owner]"""
    row = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + row)
    at = tl.arange(0, BLOCK)
    here = at < channels
    before = tl.load(x + row * x_stride + at, mask=here, other=0.0).to(tl.float32)
    added = tl.load(update + row * update_stride + at, mask=here, other=0.0).to(tl.float32)
    weight = tl.load(gate + owner * gate_stride + at, mask=here, other=0.0).to(tl.float32)
    rounded = (before + weight * added).to(total.dtype.element_ty)
    tl.store(total + row * channels + at, rounded, mask=here)
    value = rounded.to(tl.float32)
    centred = tl.where(here, value - tl.sum(value, 0) / channels, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
    factor = tl.load(scale + owner * scale_stride + at, mask=here, other=0.0).to(tl.float32)
    offset = tl.load(shift + owner * shift_stride + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * channels + at, (normed * factor + offset).to(out.dtype.element_ty), mask=here)


@triton.jit
def norm_rotate_kernel(  # noqa: PLR0913
    x, text_weight, image_weight, kinds, rotary, out,
    token_stride, kind_stride, head_stride, heads, half, eps, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token's queries (axis 1 = 0) or keys (1): RMS norm, weight of its stream, rotation of pairs."""
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF)[None]
    head = tl.arange(0, HEADS)[:, None]
    here, inside = (head < heads) & (pair < half), pair < half
    rows = x + token * token_stride + which * kind_stride + head * head_stride + 2 * pair
    first = tl.load(rows, mask=here, other=0.0).to(tl.float32)
    second = tl.load(rows + 1, mask=here, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, 1) / (2 * half)
    inverse = (1.0 / tl.sqrt(squares + eps))[:, None]
    image = tl.load(kinds + token) == 1
    at = which * 2 * half + 2 * pair
    weight_first = tl.where(
        image, tl.load(image_weight + at, mask=inside, other=0.0), tl.load(text_weight + at, mask=inside, other=0.0)
    )
    weight_second = tl.where(
        image, tl.load(image_weight + at + 1, mask=inside, other=0.0), tl.load(text_weight + at + 1, mask=inside, other=0.0)
    )
    first, second = first * inverse * weight_first, second * inverse * weight_second
    angle = rotary + token * 2 * half + 2 * pair
    cosine, sine = tl.load(angle, mask=inside, other=0.0), tl.load(angle + 1, mask=inside, other=0.0)
    to = out + ((token * 2 + which) * heads + head) * 2 * half + 2 * pair
    tl.store(to, (first * cosine - second * sine).to(out.dtype.element_ty), mask=here)
    tl.store(to + 1, (first * sine + second * cosine).to(out.dtype.element_ty), mask=here)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, segments: Segments) -> Tensor:
    """See ops.rows.ModulatedNorm."""
    tokens, channels = x.shape
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    shift, scale, x = _table(shift), _table(scale), _rows(x)
    strides = (x.stride(0), shift.stride(0), scale.stride(0))
    modulated_norm_kernel[(tokens,)](
        x, shift, scale, segments.owners(x.device), out, *strides, channels, EPS, **_sizes(channels)
    )  # fmt: skip
    return out


def gated_add_norm(
    x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """See ops.rows.GatedAddNorm."""
    tokens, channels = x.shape
    total = empty(x.shape, dtype=x.dtype, device=x.device)
    out = empty_like(total)
    gate, shift, scale, x, update = _table(gate), _table(shift), _table(scale), _rows(x), _rows(update)
    strides = tuple(t.stride(0) for t in (x, update, gate, shift, scale))
    gated_add_norm_kernel[(tokens,)](
        x, update, gate, shift, scale, segments.owners(x.device), total, out, *strides, channels, EPS, **_sizes(channels)
    )  # fmt: skip
    return total, out


def norm_rotate(queries_keys: Tensor, weights: tuple[Tensor, ...], rotary: Tensor, layout: JointLayout) -> Tensor:
    """See ops.rows.NormRotate."""
    tokens, both, heads, head_dim = queries_keys.shape
    x = _rows(queries_keys)
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    table = view_as_real(rotary.contiguous())
    text_weight, image_weight = weights[0].contiguous(), weights[-1].contiguous()
    norm_rotate_kernel[(tokens, both)](
        x, text_weight, image_weight, layout.kinds(x.device), table, out,
        x.stride(0), x.stride(1), x.stride(2), heads, head_dim // 2, EPS,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return out


KERNELS = RowKernels(modulated_norm, gated_add_norm, norm_rotate)


def _rows(x: Tensor) -> Tensor:
    """Kernels walk the last dimension without a stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(vectors: Tensor) -> Tensor:
    """(channels,) or (sequences, channels) -> (sequences, channels)"""
    return _rows(vectors if vectors.ndim == 2 else vectors[None])


def _sizes(channels: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(channels), "num_warps": 8 if channels >= WIDE else 4}
