"""How the weights of a layer are split over ranks, so that what each makes of its part adds up to what the whole would.

A layer that can be is `Splittable`: by attention heads, or by the inner channels of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """A weight's rows, in groups of these sizes that are split each, or its columns where there are none."""

    rows: Sequence[int] = ()

    def part(self, weight: Tensor, member: int, count: int) -> Tensor:
        """(out, in) -> the `member`-th of `count` parts, of its own memory"""
        if not self.rows:
            return weight.chunk(count, dim=1)[member].clone()
        return torch.cat([group.chunk(count)[member] for group in weight.split(list(self.rows))])


COLUMNS = Split()


@runtime_checkable
class Splittable(Protocol):
    def split(self, count: int) -> Mapping[str, Split]:
        """Become one of `count` parts: how each weight is split. Raises InvalidRequest where that can't be."""
        ...
