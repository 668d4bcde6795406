"""The seam at the list of transformer blocks: step caches, layer-wise offload and regional compile attach here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn


class BlockRunner(Protocol):
    """Runs all blocks of a list. `x` is whatever the blocks hand on; `call` is constant over the list."""

    def __call__(self, blocks: nn.ModuleList, x: Any, call: Any) -> Any: ...


def run_all(blocks: nn.ModuleList, x: Any, call: Any) -> Any:
    """Every block, in order."""
    for block in blocks:
        x = block(x, call)
    return x


class Blocks(nn.ModuleList):
    """A list of blocks with one contract: `block(x, call)` returns a new value shaped like `x` and changes neither."""

    runner: BlockRunner

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__(blocks)
        self.runner = run_all

    def forward(self, x: Any, call: Any) -> Any:
        return self.runner(self, x, call)
