"""Layer-wise offload: a block's weights are on the device only while it computes, and come while the one before computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from stepwell.offload.homes import Home, Room
from stepwell.ops.blocks import BlockRunner

ROOMS = 2  # one to compute in, one to fetch into
ALIGNMENT = 256  # bytes; kernels want their matrices to begin on such addresses


class Layer:
    """The tensors of one block: where each is at home, and where it lies in a room."""

    def __init__(self, block: nn.Module, home: Home):
        self.tensors = list(chain(block.parameters(), block.buffers()))
        self.sources = [home.keep(tensor.data) for tensor in self.tensors]
        self.offsets: list[int] = []
        self.size_bytes = 0
        for source in self.sources:
            self.offsets.append(self.size_bytes)
            self.size_bytes += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
        self.leave()

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors as they lie in a room's memory."""
        return [
            memory[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
            for source, offset in zip(self.sources, self.offsets, strict=True)
        ]

    def enter(self, memory: Tensor) -> None:
        """Compute with what is in the room."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view

    def leave(self) -> None:
        """Be at home; the block could still compute, slowly, or not at all where its home is not its device."""
        for tensor, source in zip(self.tensors, self.sources, strict=True):
            tensor.data = source


class Streamed:
    """A `BlockRunner` for a model whose blocks are at home; `inner` runs them one by one, each once it is here.

    Whoever calls may call with any of the blocks, in any order. What comes next is what came next the last time, at first
    the next block of the model, after the last one the first: a guess that is wrong costs the time of a fetch.
    """

    def __init__(self, blocks: Sequence[nn.Module], inner: BlockRunner, home: Home):
        self._inner, self._home = inner, home
        self._layers = {block: Layer(block, home) for block in blocks}
        self._next = dict(zip(blocks, [*blocks[1:], *blocks[:1]], strict=True))
        self._last: nn.Module | None = None
        self._rooms: list[Room] = []
        self._held: list[nn.Module | None] = [None] * ROOMS

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._layers)

    def __call__(self, blocks: Sequence[nn.Module], x: Any, call: Any) -> Any:
        try:
            for place, block in enumerate(blocks):
                if self._last is not None:
                    self._next[self._last] = block
                self._last = block
                room, layer = self._fetch(block), self._layers[block]
                room.wait()
                layer.enter(room.memory)
                self._fetch(blocks[place + 1] if place + 1 < len(blocks) else self._next[block], beside=block)
                x = self._inner((block,), x, call)
                layer.leave()
                room.leave()
        except BaseException:
            self.rest()
            raise
        return x

    def _fetch(self, block: nn.Module, beside: nn.Module | None = None) -> Room:
        """The room that holds a block, or will soon. What is `beside` it stays; else what is likely next does."""
        if not self._rooms:
            size_bytes = max(layer.size_bytes for layer in self._layers.values())
            self._rooms = [self._home.room(size_bytes) for _ in range(ROOMS)]
        if block in self._held:
            return self._rooms[self._held.index(block)]
        index = 1 if self._held[0] is (beside or self._next[block]) else 0
        room, layer = self._rooms[index], self._layers[block]
        self._held[index] = block
        room.fill(layer.sources, layer.views(room.memory))
        return room

    def come(self) -> None:
        """Each block comes when it is called."""

    def rest(self) -> None:
        """Let go of everything that was fetched."""
        for block in self._held:
            if block is not None:
                self._layers[block].leave()
        for room in self._rooms:
            room.close()
        self._rooms, self._held, self._last = [], [None] * ROOMS, None


def stays(module: nn.Module, streamed: Sequence[nn.Module] = ()) -> list[Tensor]:
    """The tensors of a module that layer-wise offload leaves alone."""
    gone = {id(tensor) for block in streamed for tensor in chain(block.parameters(), block.buffers())}
    return [tensor for tensor in chain(module.parameters(), module.buffers()) if id(tensor) not in gone]
