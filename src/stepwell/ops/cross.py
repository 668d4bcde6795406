"""Attention of every token of a sequence to a few tokens outside of it: a prompt, or what an image encoder saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stepwell.ops.packing import Segments


@dataclass(frozen=True, slots=True)
class Context:
    """Keys and values (heads, tokens, head_dim) of one sequence, made once per request.

    `bias` (1, tokens) is added to the logits: a key that stands for n equal ones has ln n, which is exact.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, repeats: int = 1) -> Context:
        """(tokens, heads, head_dim) each; the last token stands for `repeats` equal ones."""
        bias = None
        if repeats > 1:
            bias = torch.zeros(1, len(keys), dtype=keys.dtype, device=keys.device)
            bias[0, -1] = math.log(repeats)
        return cls(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), bias)


def attend(q: Tensor, contexts: Sequence[Context], segments: Segments) -> Tensor:
    """q: (tokens, heads, head_dim), one context per sequence -> (tokens, heads · head_dim)"""
    parts = []
    for rows, context in zip(segments.split(q), contexts, strict=True):
        out = F.scaled_dot_product_attention(rows.transpose(0, 1)[None], context.keys[None], context.values[None], context.bias)
        parts.append(out[0].transpose(0, 1).reshape(len(rows), -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
