"""The seam at the list of transformer blocks: step caches and layer-wise offload attach here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

from torch import Tensor, nn

from stepwell.ops.packing import Lane

Rows = tuple[Tensor, ...]  # one sequence's tokens; the first tensor is what is denoised, others (text) go along


class BlockCall(Protocol):
    """What the blocks of one forward share, and how their `x` falls into sequences.

    `split` gives each sequence's rows, `join` makes an `x` of rows again, and `only` is the call for some of the sequences.
    """

    @property
    def lanes(self) -> Sequence[Lane]: ...

    def split(self, x: Any) -> list[Rows]: ...

    def join(self, rows: Sequence[Rows]) -> Any: ...

    def only(self, places: Sequence[int]) -> Self: ...


class BlockRunner(Protocol):
    """Runs some of a model's blocks, in order. `x` is whatever the blocks hand on; `call` is the same for all of them."""

    def __call__(self, blocks: Sequence[nn.Module], x: Any, call: Any) -> Any: ...


def run_all(blocks: Sequence[nn.Module], x: Any, call: Any) -> Any:
    """Every block, in order."""
    for block in blocks:
        x = block(x, call)
    return x


class Blocks(nn.ModuleList):
    """All blocks of a model, with one contract: `block(x, call)` returns a new value and changes neither argument.

    `modulated(x, call)` of the first one gives, per sequence, what TeaCache watches: mostly what its attention sees of the rows
    to be denoised.
    """

    runner: BlockRunner

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__(blocks)
        self.runner = run_all

    def forward(self, x: Any, call: Any) -> Any:
        return self.runner(list(self), x, call)
