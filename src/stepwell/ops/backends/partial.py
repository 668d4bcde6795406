"""Attention to some of a sequence's keys, in a form that can be put together with that to the others.

softmax over all keys = the parts' own, weighted by their sums of exponentials (M. Milakov, N. Gimelshein 2018, "Online
normalizer calculation for softmax").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """What queries saw of some keys: rows (tokens, heads, head_dim) float32, and the logarithm of the sum of exponentials of
    their logits, (tokens, heads, 1) float32."""

    rows: Tensor
    log_sum: Tensor

    def with_part(self, other: Seen) -> Seen:
        """What they see of both."""
        total = torch.logaddexp(self.log_sum, other.log_sum)
        rows = self.rows * (self.log_sum - total).exp() + other.rows * (other.log_sum - total).exp()
        return Seen(rows, total)


def attend_part(q: Tensor, k: Tensor, v: Tensor) -> Seen:
    """q: (tokens, heads, head_dim); k, v: (keys, heads, head_dim)"""
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    if q.device.type == "cpu":
        rows, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values)
        return Seen(rows[0].transpose(0, 1).float(), log_sum[0].transpose(0, 1)[..., None])
    logits = (queries.float() @ keys.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    log_sum = logits.logsumexp(-1, keepdim=True)
    rows = (logits - log_sum).exp() @ values.float()
    return Seen(rows[0].transpose(0, 1), log_sum[0].transpose(0, 1))
